"""LoRA by hand: the model as a pure function, plain optax, one jitted step, and files that PEFT reads.

    python examples/train_loop.py

Trains the 2-million-parameter model that ships with the repository to answer like a ship's crew. Give another model and
rows to train those: python examples/train_loop.py Qwen/Qwen2.5-0.5B-Instruct rows.jsonl
"""

import sys
import time
from pathlib import Path

import jax
import optax

import lora_jax as lj

HERE = Path(__file__).parent
MODEL, ROWS = sys.argv[1:3] if len(sys.argv) > 2 else (HERE / "fennel-2m", HERE / "captain.train.jsonl")
STEPS, BATCH_SIZE, LEARNING_RATE, SEED = 60, 16, 4e-3, 0
PROMPT = "What day follows Friday?"

# The base is a pytree of parameters that never change; load_in_4bit=True would hold it in 4 bits.
model = lj.load(MODEL)
print(model)

# The adapter is a pytree too. adapter.trained holds what is trained: A and B of every linear layer, in float32.
init_key, dropout_key = jax.random.split(jax.random.key(SEED))
adapter = model.add_adapter(lj.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05), key=init_key)

# Rows become tokens, with weight on what the assistant says, in batches of a few different lengths.
batches = lj.batches(ROWS, model.tokenizer, batch_size=BATCH_SIZE, epochs=10, seed=SEED)
print(batches)

schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warmup_steps=5, decay_steps=STEPS)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
opt_state = optimizer.init(adapter.trained)


@jax.jit
def train_step(model, trained, opt_state, batch, key):
    """One step. The model is an argument because arrays in a closure would become constants of the program."""

    def objective(trained):
        return lj.loss(model, adapter.replace(trained=trained), batch, key=key)

    loss, gradients = jax.value_and_grad(objective)(trained)
    updates, opt_state = optimizer.update(gradients, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state, loss


@jax.jit
def evaluate(model, trained, batch):
    """The loss without dropout."""
    return lj.loss(model, adapter.replace(trained=trained), batch)


trained, losses, start = adapter.trained, [], time.perf_counter()
for step in range(STEPS):
    key = jax.random.fold_in(dropout_key, step)
    trained, opt_state, loss = train_step(model, trained, opt_state, batches[step], key)
    losses.append(float(loss))
    if step % 10 == 0 or step == STEPS - 1:
        print(f"step {step:3d}  loss {loss:.4f}  {time.perf_counter() - start:5.1f} s")

held_out = lj.batches(HERE / "captain.eval.jsonl", model.tokenizer, batch_size=BATCH_SIZE, seed=None)
for name, weights in (("before", adapter.trained), ("after", trained)):
    print(
        f"held-out loss {name}: {sum(evaluate(model, weights, batch) for batch in held_out) / len(held_out):.4f}"
    )

print("before:", model.generate(PROMPT, max_new_tokens=32))
adapter = adapter.replace(trained=trained)
print("after: ", model.generate(PROMPT, adapter=adapter, max_new_tokens=32))

# PEFT, vLLM and lora_jax can load what save writes; merge writes an ordinary checkpoint.
print("wrote", adapter.save("train_loop/adapter"))
print("wrote", lj.merge(model, adapter, "train_loop/merged", overwrite=True, quiet=True))
