"""Options of TRL, transformers, axolotl, LLaMA-Factory and Unsloth are answered with ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_jax.cli import main
from lora_jax.commands.export import ExportOptions
from lora_jax.commands.generate import GenerateOptions
from lora_jax.commands.merge import MergeOptions
from lora_jax.commands.quantize import QuantizeOptions
from lora_jax.config import RunConfig
from lora_jax.errors import UserError
from lora_jax.options import option_names, parse
from lora_jax.options.foreign import ADVICE, MISSING, RENAMED, UNNEEDED, VALUES
from lora_jax.options.unknown import Unknown, answer_to
from lora_jax.options.values import checked

OURS = option_names(RunConfig)
ALL = {
    name: hint
    for kind in (RunConfig, MergeOptions, ExportOptions, QuantizeOptions, GenerateOptions)
    for name, hint in option_names(kind).items()
}
AXOLOTL = """
    adapter base_model batch_size bf16 chat_template cosine_min_lr_ratio dataset_prepared_path
    dataset_processes datasets deepspeed early_stopping_patience eval_batch_size eval_sample_packing
    eval_steps evals_per_epoch flash_attention fp16 fsdp fsdp_config gradient_accumulation_steps
    gradient_checkpointing gradient_checkpointing_kwargs group_by_length hub_model_id learning_rate
    load_in_4bit load_in_8bit logging_steps lora_alpha lora_dropout lora_fan_in_fan_out lora_mlp_kernel
    lora_model_dir lora_modules_to_save lora_o_kernel lora_qkv_kernel lora_r lora_target_linear
    lora_target_modules loraplus_lr_ratio lr_scheduler max_grad_norm max_steps micro_batch_size
    mlflow_tracking_uri model_type neftune_noise_alpha num_epochs optimizer output_dir pad_to_sequence_len
    peft_init_lora_weights peft_layers_to_transform peft_use_dora peft_use_rslora plugins relora
    resume_from_checkpoint rl sample_packing save_safetensors save_steps save_strategy save_total_limit
    saves_per_epoch sdp_attention seed sequence_len sequence_parallel_degree shuffle_merged_datasets
    special_tokens strict test_datasets tf32 tokenizer_type tokens train_on_inputs trust_remote_code
    val_set_size wandb_entity wandb_log_model wandb_name wandb_project wandb_watch warmup_ratio warmup_steps
    weight_decay xformers_attention
"""
LLAMA_FACTORY = """
    adapter_name_or_path additional_target bf16 compute_accuracy cutoff_len dataset dataset_dir ddp_timeout
    deepspeed disable_gradient_checkpointing do_train double_quantization enable_liger_kernel eval_dataset
    eval_strategy export_dir export_quantization_bit export_size finetuning_type flash_attn fp16
    freeze_trainable_layers gradient_accumulation_steps hf_hub_token interleave_probs learning_rate
    logging_steps lora_alpha lora_dropout lora_rank lora_target loraplus_lr_ratio lr_scheduler_type
    mask_history max_grad_norm max_samples media_dir mix_strategy model_name_or_path model_revision
    neat_packing neftune_noise_alpha num_train_epochs optim output_dir overwrite_cache overwrite_output_dir
    packing per_device_train_batch_size pissa_init plot_loss pref_beta preprocessing_num_workers pure_bf16
    quantization_bit quantization_type report_to resize_vocab resume_from_checkpoint rope_scaling
    save_only_model save_steps shift_attn stage streaming template tokenized_path train_on_prompt
    trust_remote_code use_adam_mini use_badam use_dora use_galore use_rslora use_swanlab use_unsloth
    val_size warmup_ratio warmup_steps
"""
UNSLOTH = """
    bias dataset_num_proc dataset_text_field device_map dtype fast_inference fix_tokenizer full_finetuning
    gpu_memory_utilization layers_pattern layers_to_transform load_in_16bit load_in_4bit load_in_8bit
    load_in_fp8 loftq_config lora_alpha lora_dropout max_seq_length model_name modules_to_save packing r
    random_state rope_scaling target_modules token trust_remote_code use_gradient_checkpointing use_rslora
"""


def test_every_option_in_the_table_exists() -> None:
    """Renaming one of our options must not leave an answer that is itself refused."""
    for text in RENAMED:
        name, _, value = text.partition(" ")
        assert name in ALL, text
        if value:
            assert checked(name, ALL[name], [value], name) == [value], text
    for sentence in (
        *ADVICE,
        *UNNEEDED,
        *MISSING,
        *(s for values in VALUES.values() for s in values.values()),
    ):
        for text in re.findall("`([^`]+)`", sentence):
            assert text.split()[0] in ALL or text == "calibration.format", text
    for name, values in VALUES.items():
        for foreign, ours in values.items():
            with pytest.raises(UserError, match="is not a value of this option; use "):
                checked(name, ALL[name], [foreign], name)
            if "`" not in ours and name != "push_to_hub":
                assert checked(name, ALL[name], [ours], name) == [ours]


@pytest.mark.parametrize(
    "keys", [AXOLOTL, LLAMA_FACTORY, UNSLOTH], ids=["axolotl", "llama-factory", "unsloth"]
)
def test_common_keys_of_other_tools_have_an_answer(keys: str) -> None:
    """The keys of axolotl's and LLaMA-Factory's examples, and the arguments of Unsloth's two functions."""
    guesses = {
        key: found.text
        for key in keys.split()
        if key not in OURS and (found := answer_to(Unknown(key, ["x"]), OURS)).kind == "guess"
    }
    assert guesses == {}


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ("--bf16", "--bf16: unknown option. Here it is --model.compute_dtype bfloat16."),
        ("--bf16 False", "--bf16 False: unknown option. Leave it out."),
        ("--max_seq_length 512", "--max_seq_length: unknown option. Here it is --data.max_length."),
        ("--max-seq-len 512", "--max_seq_len: unknown option. Here it is --data.max_length."),
        ("--dataset_name a/b", "--dataset_name: unknown option. Here it is --data.path."),
        ("--model_name_or_path a", "--model_name_or_path: unknown option. Here it is --model.path."),
        ("--use_dora", "--use_dora: unknown option. Not supported: DoRA."),
        (
            "--flash_attn fa2",
            "--flash_attn: unknown option. Leave it out: the attention kernel is chosen for the device.",
        ),
        ("--no_gradient_checkpointing", "Here it is --train.gradient_checkpointing False."),
        ("--optimizer adamw_bnb_8bit", "--optimizer: unknown option. Here it is --train.optim adamw8bit."),
        ("--train.optim adamw_torch_fused", "adamw_torch_fused: is not a value of this option; use adamw"),
        ("--train.lr_scheduler_type cosine_with_min_lr", "use cosine, with --train.min_lr_ratio"),
        ("--data.packing True", "use bfd"),
        ("--push_to_hub True", "use the repository's id: owner/name"),
        ("--dataset a --bf16 --foo", "3 unknown options. Write: --dataset -> --data.path, --bf16 -> "),
        ("--dataset a --bf16 --foo", " bfloat16. Unknown: --foo. --help lists all options"),
    ],
)  # fmt: skip
def test_a_flag_of_another_tool_is_answered_with_ours(
    flags: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody types options of TRL, transformers or LLaMA-Factory."""
    assert main(["train", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert answer in error
    assert error.count("\n") == 1


def test_bits_are_answered_by_number() -> None:
    """`--bits 16`, as in QLoRA's scripts, asks for no quantization."""
    answers = {bits: answer_to(Unknown("bits", [bits]), OURS).text for bits in ("4", "8", "16")}
    assert answers == {"4": "model.load_in_4bit True", "8": "model.load_in_8bit True", "16": ""}


def test_merge_answers_with_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    """LLaMA-Factory's names for merging: one of them means another option than in train."""
    assert (
        main(["merge", "--model_name_or_path", "a", "--adapter_name_or_path", "b", "--export_dir", "c"]) == 2
    )
    assert (
        "Write: --model_name_or_path -> --base, --adapter_name_or_path -> --adapter, --export_dir -> --output."
        in capsys.readouterr().err
    )


def test_an_axolotl_config_is_answered_at_once(tmp_path: Path) -> None:
    """A file with the keys of axolotl's examples, including empty ones: one answer for all of them."""
    (tmp_path / "a.yml").write_text(
        "base_model: m\nload_in_4bit: true\ndatasets:\n  - path: d\n    type: alpaca\nadapter: qlora\nlora_model_dir:\n"
        "sequence_len: 4096\nlora_target_linear: true\nwandb_project:\noptimizer: adamw_torch_fused\n"
        "lr_scheduler: cosine\nval_set_size: 0.05\nbf16: auto\nfp16:\ntf32: false\n"
        "flash_attention: true\nevals_per_epoch: 4\n"
        "special_tokens:\n  pad_token: x\nfsdp_config:\n  a: b\nfroobar: 1\noutput_dir: out\n"
    )
    with pytest.raises(UserError) as raised:
        parse(RunConfig, [str(tmp_path / "a.yml")], program="")
    assert str(raised.value) == (
        f"config file {tmp_path}/a.yml: 19 unknown options. Write: base_model -> model.path, "
        "load_in_4bit -> model.load_in_4bit, datasets -> data.path, adapter: qlora -> model.load_in_4bit: True, "
        "sequence_len -> data.max_length, lora_target_linear -> lora.target_modules: all-linear, "
        "optimizer -> train.optim: adamw, lr_scheduler -> train.lr_scheduler_type, val_set_size -> data.eval_fraction, "
        "bf16: auto -> model.compute_dtype: bfloat16. Instead of evals_per_epoch: give train.eval_steps a number of "
        "steps; without it rows are evaluated before the first step and after the last. Leave out: lora_model_dir, "
        "wandb_project, fp16, tf32, flash_attention (the attention kernel is chosen for the device), "
        "fsdp_config (parameters and "
        "rows are sharded over all devices; see mesh in --help). Not supported: special_tokens (new tokens or "
        "another pad, BOS or EOS token; change the tokenizer's files and give model.resize_vocab: True). "
        "Unknown: froobar. --help lists all options"
    )
