"""The keys of an axolotl recipe, by what they mean for memory (schema of axolotl 0.18.0)."""

from __future__ import annotations

__all__ = ["HANDLED", "NOTED", "REFUSED", "WITHOUT_EFFECT"]

HANDLED = frozenset(
    """
    base_model base_model_config sequence_len micro_batch_size gradient_accumulation_steps bf16 fp16 bfloat16 float16
    float32 flash_attention sdp_attention eager_attention flex_attention xformers_attention sage_attention
    attn_implementation sample_packing multipack_real_batches gradient_checkpointing gradient_checkpointing_kwargs
    optimizer max_grad_norm trust_remote_code unfrozen_parameters overrides_of_model_config torch_empty_cache_steps
    gc_steps adapter lora_r lora_alpha lora_dropout lora_target_modules lora_target_linear lora_target_parameters
    lora_modules_to_save lora_rank_pattern lora_alpha_pattern lora_fan_in_fan_out peft_layers_to_transform
    peft_layers_pattern peft_use_dora peft_use_rslora peft_layer_replication peft_trainable_token_indices
    load_in_4bit load_in_8bit bnb_config_kwargs peft_autocast_adapter_dtype lora_mlp_kernel lora_qkv_kernel
    lora_o_kernel lora_embedding_kernel plugins
    """.split()  # noqa: SIM905 (a hundred quoted words are harder to read)
)
"""Keys that become settings, or a note of their own."""

_GPUS = "it needs several GPUs, and memscope simulates one"
_QUANTIZED = "memscope simulates weights that bitsandbytes quantizes: adapter: qlora with load_in_4bit: true"
_OFFLOADING = "what it moves to the host is not simulated; the strategy ckpt offers offload"

REFUSED = {
    "gptq": _QUANTIZED,
    "model_quantization_config": _QUANTIZED,
    "qat": "quantization-aware training is not simulated",
    "fp8": "leave it out, and add the strategy fp8",
    "deepspeed": "DeepSpeed's engine has memory of its own",
    "fsdp": _GPUS,
    "fsdp_config": _GPUS,
    "tensor_parallel_size": _GPUS,
    "context_parallel_size": _GPUS,
    "sequence_parallel_degree": _GPUS,
    "dp_shard_size": _GPUS,
    "rl": "its trainer runs several models or forward passes",
    "reward_model": "its trainer has a loss of its own",
    "process_reward_model": "its trainer has a loss of its own",
    "activation_offloading": _OFFLOADING,
    "layer_offloading": _OFFLOADING,
    "selective_checkpointing": "it keeps other activations; the strategy ckpt and memscope advise plan that",
    "tiled_mlp": "it splits the feed-forward into tiles",
    "relora": "it merges and restarts adapters",
    "lisa_n_layers": "it trains other layers in every interval",
    "use_onebitllms": _QUANTIZED,
}
"""Keys that change what is allocated in a way that is not simulated → why. A value of 1 or false is accepted."""

NOTED = {
    "torch_compile": "the step was simulated in eager mode",
    "chunked_cross_entropy": "the loss was simulated whole, which takes more memory; add -s loss",
    "cut_cross_entropy": "the logits were simulated whole, which takes more memory; add -s loss",
    "liger_rope": "Liger's kernels run on a GPU only",
    "liger_rms_norm": "Liger's kernels run on a GPU only; they keep fewer activations",
    "liger_layer_norm": "Liger's kernels run on a GPU only; they keep fewer activations",
    "liger_glu_activation": "Liger's kernels run on a GPU only; they keep fewer activations",
    "liger_swiglu": "Liger's kernels run on a GPU only; they keep fewer activations",
    "liger_cross_entropy": "Liger's kernels run on a GPU only; they take less memory",
    "liger_fused_linear_cross_entropy": "the logits were simulated whole, which takes more memory; add -s loss",
    "flash_attn_cross_entropy": "its kernel runs on a GPU only",
    "flash_attn_fuse_mlp": "its kernel runs on a GPU only",
    "flash_attn_rms_norm": "its kernel runs on a GPU only",
    "fused_attn_kernel": "its kernel runs on a GPU only",
    "sdpa_varlen": "packed rows were simulated as full rows",
    "use_kernels": "kernels of the hub run on a GPU only",
    "experts_implementation": "the experts were simulated as transformers' default runs them",
    "neftune_noise_alpha": "its noise takes one more tensor as large as the embedded batch",
    "noisy_embedding_alpha": "its noise takes one more tensor as large as the embedded batch",
    "use_eaft": "its loss was simulated as plain cross-entropy",
    "batch_flattening": "the rows of a micro-batch were simulated unjoined",
    "resize_token_embeddings_to_32x": "if the vocabulary is not a multiple of 32, give --set vocab_size=N",
    "tokens": "added tokens make the embedding larger: give --set vocab_size=N",
    "freeze_mm_modules": "give --set trained=REGEX to freeze modules",
    "fp32_norms": "give --set fp32_modules=norm",
    "auto_find_batch_size": "the batch size is the one given",
    "batch_size": "gradient_accumulation_steps and micro_batch_size decide",
    "peft": "LoftQ's initialization takes the same memory",
    "optim_target_modules": "it belongs to an optimizer that is not simulated",
    "scaling_softmax": "its scale was not simulated",
    "reinit_weights": "weights have no values in a simulation",
    "pad_to_multiple_of": "samples were simulated at sequence_len",
}
"""Keys that change memory somewhat, and are not simulated → what was done instead."""

WITHOUT_EFFECT = frozenset(
    """
    strict resume_from_checkpoint auto_resume_from_checkpoints mean_resizing_embeddings shrink_embeddings
    embeddings_skip_upcast trainer_cls trl vllm ebft quantization dynamic_checkpoint center_rewards_coefficient
    num_labels dpo_use_weighting dpo_label_smoothing precompute_ref_log_probs dpo_use_liger_kernel dpo_padding_free
    dpo_loss_type dpo_loss_weights datasets test_datasets shuffle_merged_datasets shuffle_before_merging_datasets
    dataset_prepared_path dataset_shard_num dataset_shard_idx skip_prepare_dataset num_dataset_shards_to_save
    pretraining_dataset dataset_processes dataset_num_proc dataset_exact_deduplication dataset_keep_in_memory
    dataloader_pin_memory dataloader_num_workers dataloader_prefetch_factor dataloader_drop_last accelerator_config
    remove_unused_columns push_dataset_to_hub hf_use_auth_token device device_map world_size local_rank ddp seed
    ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters do_causal_lm_eval
    eval_causal_lm_metrics do_bench_eval bench_dataset bench_split metric_for_best_model greater_is_better
    loss_watchdog_threshold loss_watchdog_patience gc_collect_steps fp8_enable_fsdp_float8_all_gather tf32
    excess_length_strategy eval_sequence_len min_sample_len max_prompt_len sample_packing_group_size
    sample_packing_bin_size sample_packing_sequentially sample_packing_mp_start_method eval_sample_packing
    pad_to_sequence_len curriculum_sampling use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks
    pretrain_multipack_buffer_size pretrain_multipack_attn pretraining_sample_concatenation streaming
    streaming_multipack_buffer_size flex_attn_compile_kwargs flash_optimum gemma4_hybrid_attn_impl large_head_attention
    flash_attn_d512 quantize_moe_experts scaling_softmax_factor scaling_softmax_bias chunked_cross_entropy_num_chunks
    eaft_alpha eaft_k tiled_mlp_num_shards tiled_mlp_use_original_mlp llama4_linearized_experts deepcompile fsdp_version
    fp32_norm_classes fsdp_final_state_dict_type val_set_size dp_replicate_size heads_k_stride ring_attn_func
    special_tokens added_tokens_overrides torch_compile_backend torch_compile_mode torch_compile_options max_steps
    warmup_steps warmup_ratio eval_steps evals_per_epoch eval_strategy evaluation_strategy save_steps saves_per_epoch
    save_strategy save_total_limit save_first_step logging_steps early_stopping_patience load_best_model_at_end
    save_only_model use_tensorboard profiler_steps profiler_steps_start include_tokens_per_second include_tkps
    orpo_alpha simpo_gamma cpo_alpha kto_desirable_weight kto_undesirable_weight rl_beta dpo_beta max_memory
    gpu_memory_limit low_cpu_mem_usage chat_template chat_template_jinja chat_template_kwargs eot_tokens
    default_system_message fix_untrained_tokens is_preprocess preprocess_iterable total_num_tokens
    total_supervised_tokens sample_packing_eff_est axolotl_config_path is_falcon_derived_model is_llama_derived_model
    is_mistral_derived_model is_qwen_derived_model generate_samples num_generation_samples generation_max_new_tokens
    generation_temperature generation_top_p generation_top_k generation_prompt_ratio generation_do_sample
    use_mlflow mlflow_tracking_uri mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts lisa_step_interval
    lisa_layers_attribute use_wandb wandb_name wandb_run_id wandb_mode wandb_project wandb_entity wandb_watch
    wandb_log_model use_comet comet_api_key comet_workspace comet_project_name comet_experiment_key comet_mode
    comet_online comet_experiment_config gradio_title gradio_share gradio_server_name gradio_server_port
    gradio_max_new_tokens gradio_temperature use_ray ray_run_name ray_num_workers resources_per_worker use_otel_metrics
    otel_metrics_host otel_metrics_port use_trackio trackio_project_name trackio_run_name trackio_space_id
    cls_model_config tokenizer_config tokenizer_use_fast tokenizer_legacy tokenizer_use_mistral_common tokenizer_type
    processor_type processor_kwargs tokenizer_save_jinja_files experimental_skip_move_to_device
    model_quantization_config_kwargs output_dir hub_model_id hub_strategy hub_revision save_safetensors image_size
    image_resize_algorithm role_boundaries lora_model_dir peft_init_lora_weights peft_ensure_weight_tying
    qlora_sharded_model_loading lora_on_cpu loraplus_lr_ratio loraplus_lr_embedding merge_lora
    merge_method relora_prune_ratio relora_prune_method relora_cpu_offload eval_batch_size train_on_inputs
    group_by_length learning_rate embedding_lr embedding_lr_scale weight_decay optim_args torchdistx_path lr_scheduler
    lr_scheduler_kwargs lr_quadratic_warmup cosine_min_lr_ratio cosine_constant_lr_ratio lr_div_factor lr_groups
    adam_epsilon adam_epsilon2 adam_beta1 adam_beta2 adam_beta3 dion_lr dion_momentum dion_rank_fraction
    dion_rank_multiple_of qgalore_rank qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant
    qgalore_proj_bits qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size num_epochs
    jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps eval_table_size eval_max_new_tokens
    type_of_model model_type revision_of_model overrides_of_model_kwargs dpo_use_logits_to_keep
    dpo_generate_during_eval dpo_norm_loss rpo_alpha eval_sample_packing debug do_bench_eval
    """.split()  # noqa: SIM905 (a hundred quoted words are harder to read)
)
"""Keys that do not decide the memory of a training step, or that only matter beside a key of `REFUSED`."""
