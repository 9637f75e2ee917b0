"""Operations around the step: a run from options to files, how it is monitored, stopped and resumed."""
