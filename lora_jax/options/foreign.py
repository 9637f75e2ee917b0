"""Names of options in TRL, transformers, PEFT, axolotl, LLaMA-Factory and Unsloth, with ours: only data.

A name may include a value, as in `adapter=qlora`, which takes precedence over the name alone. In sentences, our options
are in backticks; they are shown as a flag or as a YAML key.
"""

from __future__ import annotations

RENAMED: dict[str, str] = {
    # The model.
    "model.path": """
        model_name_or_path base_model base_model_name_or_path model_name model_id model_path
        pretrained_model_name_or_path hf_model base_model_config model_dir
    """,
    "base": "model_name_or_path base_model base_model_name_or_path model_path model_name model",
    "model.revision": "model_revision",
    "model.dtype": "torch_dtype model_dtype",
    "dtype": "torch_dtype out_dtype outtype",
    "model.compute_dtype bfloat16": "bf16 pure_bf16 bfloat16 bf16=auto",
    "model.compute_dtype float16": "fp16 float16 half",
    "model.load_in_4bit True": """
        adapter=qlora quantization_bit=4 bits=4 load_4bit qlora use_qlora quantize=4bit
        finetuning_type=qlora use_4bit
    """,
    "model.load_in_8bit True": "quantization_bit=8 bits=8 load_8bit use_8bit",
    "model.bnb_4bit_quant_type": "quantization_type quant_type",
    "model.bnb_4bit_use_double_quant": """
        double_quantization use_bnb_nested_quant use_nested_quant double_quant
    """,
    "model.resize_vocab": "resize_token_embeddings",
    # The adapter.
    "method lora": """
        adapter=lora finetuning_type=lora use_peft use_lora lora_enable peft_type=lora train_type=lora
    """,
    "method full": """
        full_finetuning finetuning_type=full full_finetune use_peft=false use_lora=false train_type=full
    """,
    "lora.r": "lora_r lora_rank rank lora_dim peft_r",
    "lora.lora_alpha": "alpha peft_alpha",
    "lora.lora_dropout": "dropout",
    "lora.target_modules all-linear": "lora_target_linear lora_target=all lora_target_modules=all",
    "lora.target_modules": "lora_target_modules lora_target target_module lora_modules",
    "lora.modules_to_save": "lora_modules_to_save additional_target",
    "lora.layers_to_transform": "peft_layers_to_transform",
    "lora.layers_pattern": "peft_layers_pattern",
    "lora.use_rslora": "peft_use_rslora use_rs_lora rslora",
    "lora.init_lora_weights": "peft_init_lora_weights init_weights",
    "lora.trainable_token_indices": "peft_trainable_token_indices",
    "lora.init_from": """
        lora_model_dir adapter_name_or_path peft_model_id lora_path adapter_path lora_name_or_path
    """,
    "adapter": """
        lora_model_dir adapter_name_or_path peft_model_id lora_path adapter_path lora_name_or_path lora
    """,
    # The rows.
    "data.path": """
        dataset datasets dataset_name dataset_path train_file train_data train_dataset data_path
        dataset_name_or_path data_files pretraining_dataset
    """,
    "calibration.path": "dataset dataset_name data_path dataset_path export_quantization_dataset",
    "calibration.rows": "export_quantization_nsamples num_samples",
    "calibration.max_length": "export_quantization_maxlen max_seq_length max_seq_len sequence_len",
    "data.eval_path": """
        eval_dataset eval_dataset_name test_datasets validation_file eval_file val_dataset test_file
        validation_dataset eval_data_path eval_data
    """,
    "data.split": "dataset_train_split dataset_split train_split",
    "data.eval_split": "dataset_test_split test_split validation_split_name",
    "data.eval_fraction": "val_set_size val_size validation_split split_dataset_ratio test_size",
    "data.max_length": """
        max_seq_length max_seq_len sequence_len cutoff_len model_max_length block_size seq_length
        max_source_length seq_len max_tokens
    """,
    "data.text_field": "dataset_text_field text_column text_column_name",
    "data.packing bfd": "sample_packing neat_packing use_packing multipack",
    "data.eval_packing bfd": "eval_sample_packing",
    "data.eval_packing none": "eval_sample_packing=false",
    "data.chat_template": "template chat_template_path chat_template_jinja prompt_template conversation",
    "data.mixture_weights": "interleave_probs dataset_mixer_weights",
    "data.num_proc": "dataset_num_proc dataset_processes preprocessing_num_workers dataset_num_workers",
    "data.truncation_mode": "excess_length_strategy truncation_strategy",
    # The optimization.
    "train.num_train_epochs": "num_epochs epochs n_epochs num_train_epoch max_epochs",
    "train.max_steps": "num_steps max_iters max_train_steps train_steps",
    "train.per_device_train_batch_size": """
        micro_batch_size train_batch_size per_device_batch_size per_gpu_train_batch_size
        train_micro_batch_size_per_gpu
    """,
    "train.per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "train.gradient_accumulation_steps": """
        grad_accum_steps gradient_accumulation grad_accum accumulation_steps
    """,
    "train.learning_rate": "lr adam_lr max_lr",
    "train.lr_scheduler_type": "lr_scheduler scheduler lr_schedule scheduler_type",
    "train.min_lr_ratio": "cosine_min_lr_ratio min_lr_rate",
    "train.warmup_steps": "num_warmup_steps warmup",
    "train.weight_decay": "wd adam_weight_decay",
    "train.optim": "optimizer optimizer_type optim_type",
    "train.max_grad_norm": """
        gradient_clipping max_gradient_norm grad_clip clip_grad_norm gradient_clip_val
    """,
    "train.adam_beta1": "beta1",
    "train.adam_beta2": "beta2",
    "train.neftune_noise_alpha": "neftune_alpha noisy_embedding_alpha",
    "train.gradient_checkpointing": "use_gradient_checkpointing grad_checkpoint activation_checkpointing",
    "train.gradient_checkpointing False": "disable_gradient_checkpointing",
    "train.offload activations": """
        activation_offloading activation_offload gradient_checkpointing=offload
    """,
    "train.seed": "random_state random_seed rng_seed",
    # What a run writes.
    "output_dir": "output out_dir save_dir output_path checkpoint_dir export_dir",
    "output": "output_dir export_dir save_dir out_dir output_path merged_dir save_directory",
    "overwrite": "overwrite_output_dir force",
    "resume True": "resume_from_checkpoint auto_resume_from_checkpoints resume_training",
    "push_to_hub": "hub_model_id repo_id push_to_hub_model_id",
    "hub_private_repo": "hub_private private",
    "train.logging_steps": "log_steps log_interval log_every_n_steps",
    "train.save_total_limit": "max_checkpoints keep_checkpoints save_limit",
    "train.eval_steps": "eval_interval evaluation_steps eval_every",
    "train.save_steps": "save_interval checkpoint_steps save_every",
    "train.run_name": "wandb_name wandb_run_name swanlab_run_name mlflow_run_name experiment_name",
    "train.report_to wandb": "use_wandb wandb",
    "train.report_to mlflow": "use_mlflow",
    "train.report_to tensorboard": "use_tensorboard",
    "max_shard_size": "export_size shard_size",
    # Devices.
    "mesh.fsdp": "dp_shard_size fsdp_size",
    "mesh.data": "dp_replicate_size ddp_size data_parallel_size",
    "mesh.tensor": "tensor_parallel_size tp_size tensor_parallel_degree tensor_model_parallel_size",
    "mesh.sequence": "sequence_parallel_degree context_parallel_size cp_size sequence_parallel_size",
    "distributed.coordinator_address": "master_addr main_process_ip rdzv_endpoint",
    "distributed.num_processes": "world_size nnodes num_machines",
    "distributed.process_id": "node_rank machine_rank",
    "distributed.timeout": "ddp_timeout",
    # Generation.
    "max_new_tokens": "max_tokens max_length",
    "prompt": "prompts input query text",
    "system": "system_prompt system_message default_system",
}
"""Our option, with a value if the name alone implies one, and the other names."""

ADVICE: dict[str, str] = {
    "give `train.per_device_train_batch_size` and `train.gradient_accumulation_steps`; a step has their"
    " product of rows a device": """
        batch_size global_batch_size total_batch_size effective_batch_size
    """,
    "give `data.completion_only_loss False`, and `data.assistant_only_loss False` for conversations": """
        train_on_inputs train_on_prompt train_on_source
    """,
    "give `train.eval_steps` a number of steps; without it rows are evaluated before the first step and"
    " after the last": """
        eval_strategy evaluation_strategy evals_per_epoch eval_delay do_eval eval_epochs
    """,
    "give `train.save_steps` a number of steps, or `train.save_strategy epoch`": """
        saves_per_epoch save_every_epoch checkpoint_every_epoch
    """,
    "give `train.early_stopping_patience` a number of evaluations": "early_stopping_steps early_stopping",
    "give `data.path` the file or the Hub id": "dataset_dir data_dir dataset_mixer data_folder",
    "append it to the id: `data.path ID:NAME`": """
        dataset_config dataset_config_name dataset_subset
    """,
    "give `data.split` a slice, such as train[:1000]": "max_samples max_train_samples num_train_samples",
    "give `data.eval_split` a slice, such as test[:100]": "max_eval_samples eval_samples",
    "give `data.mixture_weights` a number for each path": "mix_strategy dataset_mixing",
    "give `train.min_lr_ratio`; schedules have no other argument": "lr_scheduler_kwargs min_lr",
    "give `train.adam_beta1`, `train.adam_beta2` and `train.adam_epsilon`": """
        optim_args adam_betas optimizer_kwargs
    """,
    "the direction follows from the metric in `train.metric_for_best_model`": "greater_is_better",
    "list scores in `train.generation_metrics`": """
        predict_with_generate do_predict compute_metrics do_bench_eval bench_dataset
    """,
    "set the environment variable HF_TOKEN": """
        hub_token hf_token hf_hub_token token use_auth_token hf_use_auth_token
    """,
    "set HF_HOME": "cache_dir hf_home",
    "set WANDB_PROJECT and WANDB_ENTITY, and give `train.report_to wandb`": """
        wandb_project wandb_entity wandb_watch wandb_log_model wandb_mode wandb_run_id project
    """,
    "set MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME, and give `train.report_to mlflow`": """
        mlflow_tracking_uri mlflow_experiment_name hf_mlflow_log_artifacts
    """,
    "set TRACKIO_SPACE_ID, and give `train.report_to trackio`": """
        trackio_space_id trackio_bucket_id trackio_static_space_id
    """,
    "TensorBoard's files go to tensorboard/ in `output_dir`": "logging_dir tensorboard_dir",
    "give `lora.init_from` an adapter to train further": "adapter",
    "map columns in `data.columns`: our name, then the file's": """
        field_messages message_property_mappings message_field_role message_field_content field_instruction
        field_input field_output columns roles column_mapping prompt_column response_column columns_mapping
        messages_column dataset_map
    """,
    "lora-jax merge writes the merged model": "merge_lora merge_adapter merge_and_unload save_merged export_size",
    "lora-jax report draws the curves": "plot_loss",
    "lora-jax quantize writes quantized checkpoints": "export_quantization_bit",
    "give `temperature`; 0 always takes the most likely token": "do_sample greedy",
    "`resume` continues from the last checkpoint in `output_dir`": """
        ckpt checkpoint_path
    """,
    "set `data.format`": "type ds_type dataset_type formatting",
    "plain text is `data.format text`": "stage=pt do_pretrain is_pretraining",
}
"""Advice, and the names that it is for."""

UNNEEDED: dict[str, str] = {
    "the attention kernel is chosen for the device": """
        flash_attn flash_attention use_flash_attn use_flash_attention use_flash_attention_2
        attn_implementation xformers_attention sdp_attention sdpa_attention eager_attention flex_attention
        flash_attn_fuse_mlp flash_attn_fuse_qkv flash_attn_rms_norm flash_attn_cross_entropy s2_attention
    """,
    "everything is compiled, and kernels are chosen for the device": """
        torch_compile torch_compile_backend torch_compile_mode use_liger_kernel enable_liger_kernel
        liger_kernel_config liger_rope liger_rms_norm liger_glu_activation liger_layer_norm liger_swiglu
        liger_fused_linear_cross_entropy liger_cross_entropy use_unsloth use_unsloth_gc tf32 compile
        unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_rope
        unsloth_rms_norm lora_mlp_kernel lora_qkv_kernel lora_o_kernel use_v1_kernels cut_cross_entropy
        fast_inference deepcompile use_kernels plugins chunked_cross_entropy fused_cross_entropy
    """,
    "parameters and rows are sharded over all devices; see mesh in --help": """
        device_map deepspeed fsdp_config fsdp_version fsdp_final_state_dict_type local_rank ddp_backend
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
        accelerator_config parallelism_config fsdp_transformer_layer_cls_to_wrap fsdp_min_num_params no_cuda
        max_memory gpu_memory_limit split_batches qlora_sharded_model_loading ray_num_workers ring_attn_func
        heads_k_stride gpu_ids low_cpu_mem_usage lora_on_cpu offload_folder gpu_memory_utilization
    """,
    "JAX chooses the platform; JAX_PLATFORMS overrides it": """
        use_cpu use_mps_device device jit_mode_eval
    """,
    "layers are always recomputed one at a time": """
        gradient_checkpointing_kwargs activation_checkpointing_kwargs use_reentrant use_reentrant_gc
    """,
    "16-bit products need no loss scaling, and adapters stay in float32": """
        bf16_full_eval fp16_full_eval upcast_layernorm upcast_lmhead_output fp16_opt_level
        autocast_adapter_dtype half_precision_backend peft_autocast_adapter_dtype embeddings_skip_upcast
        fp16_backend float32_logits
    """,
    "tokens are cached automatically; `data.cache False` turns that off": """
        dataset_prepared_path tokenized_path overwrite_cache dataset_keep_in_memory skip_prepare_dataset
        preprocessing_batch_size push_dataset_to_hub dataset_kwargs load_from_cache_file
    """,
    "rows are read from the disk as they are needed": """
        streaming dataset_streaming buffer_size dataloader_num_workers dataloader_pin_memory
        dataloader_persistent_workers dataloader_prefetch_factor dataloader_drop_last remove_unused_columns
        dataloader_multiprocessing_context dataloader_in_order preprocessing_only
        streaming_multipack_buffer_size eval_do_concat_batches eval_use_gather_object
        eval_accumulation_steps label_names shuffle_buffer_size
    """,
    "steps are padded to a few lengths, see `data.length_buckets`": """
        group_by_length pad_to_sequence_len length_column_name pad_to_max_length train_sampling_strategy
        sample_packing_eff_est sample_packing_group_size sample_packing_bin_size packing_strategy
        padding_free flattening sample_packing_sequentially total_num_tokens padding batch_flattening
        multipack_real_batches
    """,
    "rows are shuffled every epoch, with `train.seed`": """
        data_seed shuffle_dataset shuffle_merged_datasets shuffle full_determinism ignore_data_skip
    """,
    "the first and last step are always logged, and metrics go to metrics.jsonl": """
        logging_first_step logging_strategy log_level log_level_replica log_on_each_node disable_tqdm
        logging_nan_inf_filter include_num_input_tokens_seen include_tokens_per_second
        include_effective_tokens_per_second compute_accuracy skip_memory_metrics print_param_status
        include_tkps eval_table_size eval_max_new_tokens prediction_loss_only include_for_metrics
        batch_eval_metrics
    """,
    "the command says what to do: lora-jax train, generate, merge": """
        do_train stage stage=sft task_type lora_task_type train_type inference_mode trainer_type rl=sft
    """,
    "checkpoints contain exactly what resuming needs": """
        save_only_model save_safetensors save_on_each_node safe_serialization enable_jit_checkpoint
        restore_callback_states_from_checkpoint save_first_step export_legacy_format export_device
        hub_strategy hub_always_push include_tokenizer save_optimizer_state
    """,
    "model and tokenizer are detected from the files in the folder": """
        model_type tokenizer_type tokenizer_name tokenizer_config tokenizer_use_fast use_fast_tokenizer
        tokenizer_legacy is_llama_derived_model is_mistral_derived_model is_falcon_derived_model
        fan_in_fan_out is_qwen_derived_model lora_fan_in_fan_out fix_tokenizer auto_mapping peft_type
        peft_version processor_type use_fast use_exact_model_name ensure_weight_tying megatron_config
        megatron_core model_kwargs model_init_kwargs tokenizer_name_or_path model_config
        peft_ensure_weight_tying loss_type=nll
    """,
    "4-bit codes are bitsandbytes' own, decoded by our kernels": """
        bnb_4bit_quant_storage llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight quantization_method
        quantization_device_map bnb_config_kwargs quantization_method=bitsandbytes
    """,
    "it has no effect here": """
        use_cache use_kv_cache ignore_pad_token_for_loss average_tokens_across_devices ddp
        ignore_bias_buffers strict runtime_config infer_backend
    """,
}
"""Why there is no such option, and its names: it would choose something that happens automatically."""

MISSING: dict[str, str] = {
    "selecting roles or turns by an option; mark them in the rows": """
        roles_to_train mask_history train_on_turn formatting_func
    """,
    "DoRA": "use_dora peft_use_dora use_qdora finetuning_type=dora adapter=dora",
    "PiSSA, LoftQ, EVA and other initializations of an adapter": """
        pissa_init pissa_iter pissa_convert loftq_config eva_config corda_config lora_ga_config use_loftq
        init_lora_weights=pissa velora_config
    """,
    "LoRA+, a separate learning rate for B": """
        loraplus_lr_ratio loraplus_lr_embedding use_loraplus embedding_lr embedding_lr_scale lr_groups
        embedding_learning_rate
    """,
    "methods other than LoRA and full fine-tuning": """
        finetuning_type adapter=llama-adapter use_galore galore_target galore_rank galore_update_interval
        galore_scale use_apollo apollo_target apollo_rank use_badam badam_mode use_llama_pro relora
        relora_steps freeze_trainable_layers freeze_trainable_modules freeze_extra_modules oft_rank
        oft_target oft_block_size use_adam_mini use_muon alora_invocation_tokens use_qalora
        qalora_group_size layer_replication peft_layer_replication use_bdlora arrow_config monteclora_config
        kasa_config lora_target_parameters target_parameters unfrozen_parameters lisa_n_layers
        lisa_step_interval optim_target_modules mixture_of_depths shift_attn use_mca lora_bias
    """,
    "training on preferences or rewards (DPO, KTO, GRPO, PPO)": """
        rl stage=dpo stage=kto stage=ppo stage=rm stage=grpo beta rl_beta dpo_beta pref_beta pref_loss
        pref_ftx ref_model reward_model num_generations orpo_alpha kto_desirable_weight
        kto_undesirable_weight dpo_label_smoothing simpo_gamma trl vllm use_vllm reward_funcs rpo_alpha
        max_prompt_length max_completion_length
    """,
    "code that comes with a checkpoint": "trust_remote_code remote_code",
    "new tokens or another pad, BOS or EOS token; change the tokenizer's files and give "
    "`model.resize_vocab True`": """
        special_tokens tokens add_tokens add_special_tokens pad_token eos_token bos_token
        added_tokens_overrides new_special_tokens_config init_special_tokens split_special_tokens
        pad_token_id
    """,
    "this setting of the chat template": """
        tool_format default_system_message chat_template_kwargs enable_thinking prompt_style map_eos_token
    """,
    "position scaling other than config.json's": """
        rope_scaling rope_theta overrides_of_model_config
    """,
    "losses other than cross-entropy": """
        label_smoothing_factor label_smoothing use_dft_loss loss_type router_aux_loss_coef moe_aux_loss_coef
        kd_alpha kd_temperature kd_ce_alpha focal_loss use_eaft_loss use_asft_loss z_loss
    """,
    "quantized arithmetic, or formats other than bitsandbytes'": """
        fp8 fp8_backend gptq quantization_bit qat quantization load_in_16bit load_in_fp8 awq
        llm_int8_threshold fp8_enable_fsdp_float8_all_gather hqq export_quantization_method
    """,
    "images, audio and video": """
        media_dir image_max_pixels image_min_pixels freeze_vision_tower freeze_multi_modal_projector
        freeze_language_model video_max_pixels video_fps video_maxlen image_size image_resize_algorithm
        finetune_vision_layers finetune_language_layers is_multimodal crop_to_patches audio_sampling_rate
    """,
    "finding a batch size by trial; lora-jax plan --search finds one": """
        auto_find_batch_size torch_empty_cache_steps
    """,
    "training from random weights": "train_from_scratch reinit_weights from_scratch",
    "this tracker": """
        use_comet comet_project_name comet_api_key use_swanlab swanlab_project swanlab_mode
        swanlab_workspace swanlab_api_key use_trackio neptune_project aim_repo otel_metrics_port
        use_otel_metrics swanlab_logdir
    """,
    "beam search": "num_beams eval_num_beams length_penalty",
    "a debugger of the training loop": "debug profiler_steps detect_anomaly",
    "removing duplicate rows": "dataset_exact_deduplication deduplicate",
}
"""What is not supported, and the names that ask for it."""

_DTYPES = {
    "bf16": "bfloat16",
    "torch.bfloat16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "torch.float16": "float16",
    "fp32": "float32",
    "float": "float32",
    "torch.float32": "float32",
    "f32": "float32",
    "f16": "float16",
}
_COSINE = "cosine, with `train.min_lr_ratio`"
VALUES: dict[str, dict[str, str]] = {
    "model.dtype": _DTYPES,
    "model.compute_dtype": _DTYPES,
    "model.bnb_4bit_compute_dtype": _DTYPES,
    "dtype": _DTYPES,
    "train.optim": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "adamw_torch_xla": "adamw",
        "adamw_apex_fused": "adamw",
        "adamw_torch_npu_fused": "adamw",
        "adamw_anyprecision": "adamw",
        "adamw_fused": "adamw",
        "adamw_bnb_8bit": "adamw8bit",
        "adamw_8bit": "adamw8bit",
        "adamw_torch_8bit": "adamw8bit",
        "paged_adamw": "paged_adamw_32bit",
        "paged_adamw8bit": "paged_adamw_8bit",
        "lion_32bit": "lion",
        "lion_pytorch": "lion",
        "adam": "adamw",
    },
    "train.lr_scheduler_type": {
        "cosine_with_min_lr": _COSINE,
        "cosine_warmup_with_min_lr": _COSINE,
        "cosine_annealing": "cosine",
        "none": "constant",
        "linear_with_warmup": "linear",
        "cosine_with_warmup": "cosine",
    },
    "train.gradient_checkpointing": {"unsloth": "True", "offload": "True, with `train.offload activations`"},
    "train.save_strategy": {"best": "steps, with `train.load_best_model_at_end True`", "none": "no"},
    "data.packing": {
        "true": "bfd",
        "false": "none",
        "yes": "bfd",
        "no": "none",
        "ffd": "bfd",
        "bfd_split": "wrapped",
    },
    "data.eval_packing": {"true": "bfd", "false": "none", "yes": "bfd", "no": "none"},
    "data.truncation_mode": {
        "truncate": "keep_start",
        "truncation": "keep_start",
        "split": "windows",
        "delete": "drop",
    },
    "data.format": {
        "alpaca": "instruction",
        "sharegpt": "messages",
        "chatml": "messages",
        "chat_template": "messages",
        "conversational": "messages",
        "openai": "messages",
        "completion": "text",
        "pretrain": "text",
    },
    "calibration.format": {
        "alpaca": "instruction",
        "sharegpt": "messages",
        "chatml": "messages",
        "completion": "text",
    },
    "lora.target_modules": {
        "all": "all-linear",
        "all_linear": "all-linear",
        "linear": "all-linear",
        "auto": "all-linear",
    },
    "lora.bias": {"false": "none", "true": "all", "no": "none"},
    "method": {"qlora": "lora, with `model.load_in_4bit True`", "sft": "lora"},
    "push_to_hub": {
        "true": "the repository's id: owner/name",
        "yes": "the repository's id: owner/name",
        "false": "None",
    },
    "resume": {"auto": "True", "last": "True", "latest": "True"},
}
"""Values of our options under their names in other tools."""
