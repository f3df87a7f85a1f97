"""TrainingArguments of transformers (and SFTConfig of TRL) as a recipe: the JSON that `args.to_json_string()` writes.

Keys read: those of transformers 4.48.1 and 5.23, and of SFTConfig in TRL 0.13 to 1.16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from memscope.errors import UsageError, excerpt
from memscope.targets.hf.program import HfRecipe

__all__ = ["is_one", "read"]

_REFUSED = {
    "fsdp": "fully sharded training needs several GPUs",
    "deepspeed": "DeepSpeed's engine has memory of its own",
    "use_liger_kernel": "Liger's kernels run on a GPU only, and keep other activations",
    "label_smoothing_factor": "the Trainer's label smoother has a loss of its own",
    "activation_offloading": "TRL's offloading keeps activations on the host; the strategy ckpt offers offload",
    "parallelism_config": "parallel training needs several GPUs",
}
"""Keys that change what is allocated, in a way that is not simulated → why."""

_NOTED = {
    "torch_compile": "torch_compile=true was ignored: the step was simulated in eager mode",
    "neftune_noise_alpha": "neftune_noise_alpha was ignored: its noise takes a tensor as large as the embedded batch",
    "auto_find_batch_size": "auto_find_batch_size was ignored: the batch size is the one given",
}

_HANDLED = {
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "activation_checkpointing",
    "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "bf16", "fp16", "optim", "adafactor",
    "max_grad_norm", "torch_empty_cache_steps", "use_cache", "max_length", "max_seq_length", "packing", "padding_free",
    "model_init_kwargs", "optim_args",
}  # fmt: skip

_WITHOUT_EFFECT = frozenset(
    """
    output_dir overwrite_output_dir num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
    warmup_steps warmup_ratio weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules
    average_tokens_across_devices bf16_full_eval fp16_full_eval tf32 torch_compile_backend torch_compile_mode
    liger_kernel_config logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen include_tokens_per_second log_level log_level_replica disable_tqdm report_to run_name
    project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy evaluation_strategy eval_steps
    eval_delay per_device_eval_batch_size per_gpu_eval_batch_size per_gpu_train_batch_size prediction_loss_only
    eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics
    include_inputs_for_metrics batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node
    save_safetensors save_total_limit enable_jit_checkpoint push_to_hub push_to_hub_model_id push_to_hub_organization
    push_to_hub_token hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed jit_mode_eval use_ipex use_cpu no_cuda
    use_mps_device accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    remove_unused_columns label_names group_by_length train_sampling_strategy length_column_name
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    ddp_timeout_delta fsdp_min_num_params fsdp_config fsdp_transformer_layer_cls_to_wrap debug skip_memory_metrics
    do_train do_eval do_predict resume_from_checkpoint local_rank tpu_num_cores tpu_metrics_debug past_index
    mp_parameters half_precision_backend fp16_backend fp16_opt_level logging_dir dispatch_batches split_batches
    torchdynamo ray_scope use_legacy_prediction_loop split_batches
    chat_template_path dataset_text_field dataset_kwargs dataset_num_proc dataset_batch_size eos_token pad_token
    pad_to_multiple_of eval_packing completion_only_loss assistant_only_loss num_of_sequences chars_per_token
    packing_strategy shuffle_dataset dataset_test_split dataset_train_split trust_remote_code
    """.split()  # noqa: SIM905 (a hundred quoted words are harder to read)
)


def is_one(values: Mapping[str, Any]) -> bool:
    """Whether a JSON object is TrainingArguments: most of its keys are theirs."""
    known = _HANDLED | _WITHOUT_EFFECT | _REFUSED.keys() | _NOTED.keys()
    return bool(values) and 2 * len(values.keys() & known) > len(values)


def read(values: Mapping[str, Any], place: str) -> HfRecipe:
    """The recipe of TrainingArguments.

    Raises:
        UsageError: keys contradict each other, or one cannot be simulated; the message names it.
    """
    for key, why in _REFUSED.items():
        if values.get(key):
            raise UsageError(f"{place}: {key}={excerpt(values[key])} is not supported: {why}")
    if values.get("bf16") and values.get("fp16"):
        raise UsageError(f"{place}: bf16 and fp16 are both true: choose one")
    checkpointing = values.get("activation_checkpointing") or values.get("gradient_checkpointing") or False
    options = values.get("activation_checkpointing_kwargs") or values.get("gradient_checkpointing_kwargs") or {}
    settings: dict[str, Any] = {
        "micro_batch": _number(values, "per_device_train_batch_size", place, 8),
        "accumulation": _number(values, "gradient_accumulation_steps", place, 1),
        "gradient_checkpointing": bool(checkpointing),
        "autocast": "bf16" if values.get("bf16") else "fp16" if values.get("fp16") else "off",
        "clip_grad_norm": _number(values, "max_grad_norm", place, 1.0, float),
        "use_cache": bool(values.get("use_cache", False)),
        "packing": bool(values.get("padding_free")) or (bool(values.get("packing")) and "padding_free" in values),
        "keep_batch": True,
    }
    if isinstance(options, Mapping) and "use_reentrant" in options:
        settings["reentrant"] = bool(options["use_reentrant"])
    if length := values.get("max_length") or values.get("max_seq_length"):
        settings["seq_len"] = length
    if every := values.get("torch_empty_cache_steps"):
        settings["empty_cache_every"] = every
    name = "adafactor" if values.get("adafactor") else values.get("optim")
    if name is not None:
        settings["optimizer"] = str(name).rpartition(".")[2].lower()
    settings |= _of_model(values.get("model_init_kwargs"), place)
    return HfRecipe(settings, tuple(_notes(values, place)))


_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "auto": "auto"}


def _of_model(options: Any, place: str) -> dict[str, Any]:
    """What SFTConfig's `model_init_kwargs` say, which it passes to `from_pretrained`."""
    if not isinstance(options, Mapping):
        return {}
    dtype = str(options.get("dtype") or options.get("torch_dtype") or "auto").removeprefix("torch.")
    flags = {key: True for key in ("load_in_4bit", "load_in_8bit") if options.get(key)}
    chosen = {
        "attention": options.get("attn_implementation"),
        "dtype": _DTYPES.get(dtype, "auto"),
        "quantization": options.get("quantization_config") or flags or None,
    }
    return {key: value for key, value in chosen.items() if value is not None}


def _notes(values: Mapping[str, Any], place: str) -> list[str]:
    notes = [f"{place}: {text}" for key, text in _NOTED.items() if values.get(key)]
    known = _HANDLED | _WITHOUT_EFFECT | _REFUSED.keys() | _NOTED.keys()
    unknown = sorted(key for key, value in values.items() if key not in known and not key.startswith("_") and value)
    if unknown:
        notes.append(f"{place}: memscope does not know {', '.join(unknown)} and ignored {_them(unknown)}")
    return notes


def _them(names: list[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _number(
    values: Mapping[str, Any], key: str, place: str, default: float, kind: Callable[[Any], float] = int
) -> float:
    value = values.get(key)
    if value is None:
        return default
    try:
        number = kind(value)
    except (TypeError, ValueError):
        number = -1
    if number < 0:
        raise UsageError(f"{place}: {key}={excerpt(value)}: expected a number")
    return number
