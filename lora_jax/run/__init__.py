"""Operations around the step: a run from options to files, and all that it is watched, stopped and resumed by."""
