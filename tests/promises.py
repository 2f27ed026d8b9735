"""Each promise of this project, and the tests that fail when it is broken. test_promises.py holds this table.

A test is named by its file under tests/ and its function, with [a case] where one of many is meant. Whoever removes or
renames a test finds its name here, and what would no longer be proved.
"""

from __future__ import annotations

Tests = tuple[str, ...]

_K = "backends/kt_kernel/"
_GUARDS = f"{_K}test_guards.py::test_refused_in_python"
_CONTRACT = f"{_K}test_contract.py::test_rule"

# What went wrong for others who put kt-kernel into a trainer or a server.
FAILURES: dict[str, Tests] = {
    "meta-device": (
        "test_patch.py::test_no_hooks_of_a_device_map_are_left",
        "test_patch.py::test_offloaded_weights_are_refused",
    ),
    "gpu-experts-none": ("test_patch.py::test_no_number_of_gpu_experts_is_not_set",),
    "threads-none": (
        "test_patch.py::test_threads_are_planned_or_clamped",
        "test_patch.py::test_no_threads_are_refused",
        "system/test_cpu.py::test_larger_request_is_clamped_with_a_warning",
    ),
    "load-order": (
        "peft_compat/test_load_order.py::test_any_order_that_works_gives_the_same",
        "peft_compat/test_load_order.py::test_an_adapter_loaded_before_the_patch_is_kept_or_refused",
    ),
    "safe-open-close": ("adapters/test_files.py::test_no_file_is_left_open",),
    "header-too-large": ("adapters/test_files.py::test_a_pickle_called_safetensors_is_refused",),
    "device-mismatch": (
        "backends/gpu/test_device_mismatch.py::test_device_mismatch",
        "backends/gpu/test_device_mismatch.py::test_device_mismatch_in_a_model",
        "experts/test_inputs.py::test_input_dtypes",
    ),
    "routing-modified": (
        "experts/test_inputs.py::test_ids_and_layouts",
        "experts/test_inputs.py::test_the_output_is_new_memory",
    ),
    "lora-no-effect": ("peft_compat/test_load_order.py::test_a_loaded_adapter_of_experts_alone_has_effect",),
    "int8-segfault": (
        f"{_K}test_weight_path.py::test_it_trains_or_a_bad_weight_path_is_refused",
        "quantized/test_folder.py::test_broken_folders_and_wrong_settings_are_refused",
    ),
    "router-shape": (
        "test_patch.py::test_routers_are_called_by_the_model_alone",
        "test_patch.py::test_routers_are_not_called_by_the_callback",
    ),
    "cache-overflow": ("trainer/test_stock_trainer.py::test_cache_overflow",),
    "cache-underflow": ("experts/test_threads.py::test_calls_of_several_threads_come_one_after_the_other",),
    "grad-on-gpu": (
        "backends/gpu/test_device_mismatch.py::test_grad_on_gpu",
        "experts/test_casts.py::test_the_default_device_is_not_the_operators",
    ),
    "rank-lost": (
        "experts/test_adapters.py::test_ranks_from_1_to_256",
        "experts/test_adapters.py::test_one_adapter[rank_pattern]",
        "placement/test_packer.py::test_smaller_ranks_are_padded",
    ),
    "trainer-signature": ("trainer/test_stock_trainer.py::test_trainer_signature",),
    "empty-experts-nan": ("test_patch.py::test_no_empty_weight_is_left_to_wrap",),
    "fp32-upcast": (
        "experts/test_casts.py::test_casts_change_nothing",
        "experts/test_casts.py::test_a_cast_of_the_parameters_data_is_followed",
        "experts/test_casts.py::test_pefts_casts_and_autocast_change_nothing",
    ),
    "bf16-range": (
        f"{_K}test_gate_overflow.py::test_every_gate_at_a_value",
        f"{_K}test_gate_overflow.py::test_gates_far_below_zero",
    ),
    "cuda-graph": (
        "experts/test_capture.py::test_compiled_graphs_leave_the_layer_out",
        "backends/gpu/test_device_mismatch.py::test_cuda_graph_capture_is_refused_in_words",
        "backends/gpu/test_device_mismatch.py::test_cuda_graph_of_torch_compile",
    ),
    "stale-active-experts": (
        "experts/test_order.py::test_between_forward_and_backward_of_a_model",
        "experts/test_order.py::test_between_forward_and_backward_of_a_layer",
        "experts/test_schedules.py::test_any_schedule_is_right",
    ),
    "stale-pointers": (
        "trainer/test_stock_trainer.py::test_stale_pointers",
        "trainer/test_stock_trainer.py::test_stale_pointers_over_two_pools",
    ),
}

# docs/kernel-contract.md: what the operators demand, by its number. That they do demand it, and that it is kept.
CONTRACT: dict[int, Tests] = {
    1: (
        f"{_GUARDS}[1 hidden size]", f"{_GUARDS}[1 intermediate size]", f"{_GUARDS}[1 split over pools]",
        "backends/test_registry.py::test_each_arithmetic_has_its_multiples",
    ),
    2: (
        f"{_GUARDS}[2 more experts a token]",
        "experts/test_adapters.py::test_fewer_experts_a_token_than_the_model_says",
    ),
    3: (
        f"{_GUARDS}[3 longer than max_len]", f"{_GUARDS}[3 max_len that no memory holds]",
        f"{_CONTRACT}_3_any_number_of_tokens_up_to_max_len",
        "experts/test_checkpointing.py::test_long_batches_are_computed_in_pieces",
        "experts/test_errors.py::test_no_tokens",
    ),
    4: (
        f"{_GUARDS}[4 ids of int32]", f"{_GUARDS}[4 id too large]", f"{_GUARDS}[4 id negative]",
        f"{_GUARDS}[4 huge id through the layer is skipped]", f"{_CONTRACT}_4_minus_one_means_no_expert",
        "experts/test_inputs.py::test_ids_and_layouts",
    ),
    5: (
        f"{_GUARDS}[5 routing weights of bf16]", f"{_GUARDS}[5 hidden states of fp32]",
        f"{_GUARDS}[5 hidden states not contiguous]", f"{_GUARDS}[5 hidden states of another width]",
        "experts/test_inputs.py::test_input_dtypes",
    ),
    6: (
        f"{_K}test_source.py::test_what_is_set_to_one_value[max_cache_depth]",
        f"{_CONTRACT}_6_one_saved_forward_the_second_overwrites_the_first",
        "experts/test_order.py::test_two_forwards_before_one_backward_of_a_layer",
    ),
    7: (
        f"{_GUARDS}[7 a forward in between]", f"{_GUARDS}[7 a LoRA update in between]",
        f"{_CONTRACT}_7_a_small_forward_in_between_spoils_grad_input_only",
        "experts/test_order.py::test_between_forward_and_backward_of_a_layer",
    ),
    8: (
        f"{_GUARDS}[8 gradient of another length]", f"{_GUARDS}[8 backward without a forward]",
        f"{_CONTRACT}_8_backward_on_an_empty_cache_raises_and_leaves_the_layer_usable",
    ),
    9: (
        f"{_GUARDS}[9 rank larger than packed]", f"{_GUARDS}[9 a LoRA tensor of another shape]",
        f"{_GUARDS}[9 rank 0 trains the input]",
    ),
    10: (
        f"{_GUARDS}[10 values changed after packing are seen]", f"{_CONTRACT}_10_changed_lora_needs_an_update",
        "experts/test_fresh_lora.py::test_seen_without_a_word",
    ),
    11: (
        f"{_CONTRACT}_11_authoritative_gradients_overwrite_and_zero_the_untouched",
        f"{_CONTRACT}_11_buffers_must_be_the_layers_own",
        f"{_K}test_contract_of_int8.py::test_rule_11_int4_adds_to_some_and_wants_zeros",
        "experts/test_layer.py::test_untouched_experts_get_a_gradient_of_exactly_zero",
    ),
    12: (
        f"{_GUARDS}[12 keys are never used twice]",
        "quantized/test_folder.py::test_twice_in_a_process_and_after_an_adapter",
    ),
    13: (
        f"{_GUARDS}[13 one engine for two plans]",
        "experts/test_threads.py::test_calls_of_several_threads_come_one_after_the_other",
    ),
    14: (
        f"{_GUARDS}[14 weights may go once loaded]",
        f"{_K}test_contract_of_int8.py::test_rule_14_base_weights_may_go",
    ),
    15: (
        f"{_GUARDS}[15 dropout never reaches the operator]",
        f"{_K}test_source.py::test_what_is_set_to_one_value[lora_dropout]",
        f"{_K}test_source.py::test_what_is_set_to_one_value[swiglu_limit]",
        f"{_K}test_source.py::test_what_is_never_named[swiglu_alpha]",
        "experts/test_adapters.py::test_dropout_warns_once_and_is_not_applied",
    ),
    16: (
        f"{_GUARDS}[16 a forked child]",
        "process_life/test_exit.py::test_end",
        "process_life/test_workers.py::test_worker_that_calls_the_model",
    ),
    17: (
        f"{_GUARDS}[17 experts on the GPU]",
        f"{_K}test_source.py::test_what_is_never_named[gpu_experts_mask]",
        f"{_K}test_source.py::test_what_is_never_named[num_gpu_experts]",
    ),
    18: (
        f"{_CONTRACT}_18_a_shared_cache_pool_keeps_one_forward_for_all_layers",
        "experts/test_checkpointing.py::test_checkpointing",
    ),
    19: (f"{_K}test_source.py::test_what_is_never_named[submit_backward_repack]",),
    20: (
        f"{_K}test_gate_overflow.py::test_the_operators_alone_give_nan",
        f"{_K}test_gate_overflow.py::test_gates_far_below_zero",
        "experts/test_errors.py::test_gradient_that_became_nan_names_the_layer",
    ),
}  # fmt: skip

# The decisions that the design rests on.
DECISIONS: dict[int, tuple[str, Tests]] = {
    1: (
        "only `experts` is replaced, by structure; what cannot be is refused by name",
        (
            "test_patch.py::test_only_the_experts_are_replaced",
            "test_patch_refused.py::test_unsupported_models_are_refused_by_name",
            "trainer/test_whole_model.py::test_auxiliary_loss",
        ),
    ),
    2: (
        "base weights are taken over by the backend, never copied, released layer by layer",
        (
            "test_patch.py::test_old_modules_and_parameters_die",
            "test_patch.py::test_peak_memory_of_patching_and_packing",
            "placement/test_packer.py::test_torch_packs_without_a_copy",
        ),
    ),
    3: (
        "each projection is a PEFT layer, and PEFT's internals are touched in one package",
        (
            "peft_compat/test_peft.py::test_an_ordinary_config_reaches_everything",
            "peft_compat/test_peft.py::test_saved_keys",
            "peft_compat/test_patches.py::test_without_the_shim_a_patched_model_loses_its_expert_lora",
            "peft_compat/test_patches.py::test_unpatched_model_is_converted_as_ever",
        ),
    ),
    4: (
        "fp32 masters and bf16 copies that no cast or move reaches and that a forward refreshes by itself",
        (
            "experts/test_casts.py::test_casts_change_nothing",
            "experts/test_adapters.py::test_dtype_of_the_parameters",
            "experts/test_adapters.py::test_initial_values",
            "experts/test_fresh_lora.py::test_seen_without_a_word",
            "experts/test_fresh_lora.py::test_unchanged_lora_is_copied_once",
            "trainer/test_callback.py::test_refreshed_at_begin_steps_and_end",
        ),
    ),
    5: (
        "any order of forwards, adapters and backwards is right; the usual order is fast",
        (
            "experts/test_schedules.py::test_any_schedule_is_right",
            "experts/test_tickets.py::test_lora_changed_between_forward_and_backward",
            "experts/test_checkpointing.py::test_checkpointing",
            "experts/test_activation_memory.py::test_memory_of_two_and_of_twelve_layers",
        ),
    ),
    6: (
        "every rule of the contract is checked in Python; values that are not finite name the layer",
        (
            _GUARDS,
            "experts/test_adapters.py::test_bad_input_is_refused_by_the_layers_name",
            "experts/test_errors.py::test_output_that_is_not_finite_names_the_layer",
        ),
    ),
    7: (
        "backend torch is a real backend; `auto` picks by the machine and says why",
        (
            "experts/test_layer.py::test_with_random_lora",
            "backends/test_registry.py::test_in_a_process_without_operators",
            "backends/test_registry.py::test_auto_takes_the_operators_where_they_run",
            "backends/test_registry.py::test_auto_goes_by_the_machine_and_not_by_pytorchs_threads",
        ),
    ),
    8: (
        "threads: the physical cores of the affinity less one, pools on several NUMA nodes",
        (
            "system/test_cpu.py::test_plan_is_the_physical_cores_less_one",
            "system/test_cpu.py::test_plan_over_nodes",
            f"{_K}low_bit/test_pools.py::test_pools_are_bound_to_the_nodes_of_the_plan",
        ),
    ),
    9: (
        "no adapter is lost: saves are verified and have a manifest, loads check it",
        (
            "adapters/test_nothing_lost.py::test_checkpoints",
            "adapters/test_nothing_lost.py::test_what_is_pushed",
            "adapters/test_corruption.py::test_refused",
            "adapters/test_kill.py::test_killed",
            "trainer/test_callback.py::test_run_that_would_save_nothing_is_refused",
            "test_patch_refused.py::test_merging_is_refused_in_words",
        ),
    ),
    10: (
        "layers are packed when their rank is known; smaller ranks are padded, a larger one is refused",
        (
            "placement/test_packer.py::test_packed_when_the_rank_is_known",
            "placement/test_packer.py::test_packed_at_once_with_a_rank_given",
            "placement/test_packer.py::test_smaller_ranks_are_padded",
            "placement/test_packer.py::test_larger_rank_than_packed_is_refused",
            "checkpoint/test_arguments.py::test_the_operators_need_a_rank",
        ),
    ),
    11: (
        "several processes each own a part of the experts, of hosts too; DataParallel, DeepSpeed, FSDP1 are refused",
        (
            "test_patch_refused.py::test_several_processes_by_environment",
            "test_patch_refused.py::test_data_parallel",
            "ranks/test_agreement.py::test_two_ranks_compute_what_one_does",
            "ranks/test_failures.py::test_an_error_of_one_rank_is_raised_on_all",
            "ranks/test_hosts.py::test_four_ranks_of_two_hosts_compute_what_one_process_does",
            "ranks/test_sharded.py::test_fsdp1_is_refused",
            "trainer/test_callback.py::test_runs_over_several_devices_are_refused",
        ),
    ),
    12: (
        "three tiers give what one gives, each with the ids of its experts",
        (
            "backends/test_three_tiers.py::test_any_placement",
            "backends/test_tiered.py::test_the_tiers_are_computed_by_their_backends",
            "backends/gpu/test_streamed.py::test_any_placement",
        ),
    ),
    13: (
        "automatic before optional: placement, buffers and backend are chosen, and the log says why",
        (
            "placement/test_planner.py::test_auto",
            "placement/test_planner.py::test_it_is_the_best_there_is",
            "placement/test_packer.py::test_backward_weights_are_shared_by_need",
            "placement/test_packer.py::test_need_is_that_of_the_arithmetic_and_is_told",
            "monitoring/test_tier_times.py::test_what_a_plan_took",
        ),
    ),
    14: (
        "low-bit weights are codes and scales, widened where they are used; LoRA knows nothing of it",
        (
            "backends/test_8_bits.py::test_every_kind_to_the_bit",
            "checkpoint/test_sources.py::test_8_bits_are_dequantised",
            f"{_K}low_bit/test_numbers.py::test_int8_of_random_layers",
        ),
    ),
    15: (
        "what loading refuses saving refuses, and nothing of a user's data is dropped unnamed",
        (
            "adapters/test_nothing_lost.py::test_a_state_dict_without_experts_is_not_saved",
            "adapters/test_merge.py::test_what_finds_no_place_is_an_error",
            "train/test_data.py::test_its_malformed_twin_is_refused_above_one_percent",
            "train/test_data_tokens.py::test_tokens_and_labels_are_trls",
            "train/test_data_tokens.py::test_a_prompt_longer_than_the_limit_is_told_and_stops_above_one_percent",
            "train/test_data_rows.py::test_columns_that_nobody_uses_are_named_once",
        ),
    ),
}

# What the pages tell their readers, by words that stand there.
PAGES: dict[str, dict[str, Tests]] = {
    "README.md": {
        "Needed: Linux, Python 3.11": ("test_versions.py::test_floors_are_those_of_the_package",),
        "with a **stock** Hugging Face": (
            "trainer/test_stock_trainer.py::test_trainer_signature",
            "trainer/test_sft.py::test_curve", "trainer/test_dpo.py::test_curve",
        ),
        "works as well, unchanged": ("peft_compat/test_peft.py::test_an_ordinary_config_reaches_everything",),
        "several adapters and `disable_adapter()` are PEFT's": (
            "peft_compat/test_peft.py::test_switching_adapters",
            "peft_compat/test_peft.py::test_disabled_adapter_is_the_base_to_the_bit",
            "adapters/test_resume.py::test_resumed_is_uninterrupted",
        ),
    },
    "docs/how-it-works.md": {
        "refreshed after each optimizer step": (
            "trainer/test_callback.py::test_refreshed_at_begin_steps_and_end",
            "trainer/test_stock_trainer.py::test_stale_pointers",
        ),
        "and says which and why": ("backends/test_registry.py::test_in_a_process_without_operators",),
        "On two cores without AMX it picks PyTorch too": (
            "backends/test_registry.py::test_auto_computes_by_pytorch_on_few_cores",
        ),
        "logs tokens per second and the load of the experts": (
            "monitoring/test_expert_load.py::test_a_run_logs_each_token_once",
        ),
        "is an error in Python that names the field, the value and the fix": (
            "test_config.py::test_bad_values_are_refused_by_name_and_value", _GUARDS,
        ),
    },
    "docs/models.md": {
        "refused, with the reason": (
            "test_patch_refused.py::test_unsupported_models_are_refused_by_name",
        ),
        "within 1 % forward and 2 % in every gradient": ("experts/test_layer.py::test_with_random_lora",),
        "however far below": (f"{_K}test_gate_overflow.py::test_gates_far_below_zero",),
        "stay within 0.009 of stock's": (
            "end_to_end/test_against_stock.py::test_losses_of_twenty_steps_are_stocks",
        ),
    },
    "docs/limits.md": {
        "`nn.DataParallel` is refused in words": (
            "test_patch_refused.py::test_several_processes_by_torch", "test_patch_refused.py::test_data_parallel",
        ),
        "LoRA bias and the data-driven initializations are refused": (
            "experts/test_adapters.py::test_variants_of_lora_are_refused_by_name",
        ),
        "cannot be merged into a patched model in place": (
            "test_patch_refused.py::test_merging_is_refused_in_words", "adapters/test_merge.py::test_merged_fp32",
            "adapters/test_merge.py::test_memory",
        ),
        "a patched model that is deleted leaves them behind": (
            "process_life/test_models_in_turn.py::test_memory_of_deleted_layers",
        ),
    },
    "docs/reference/settings.md": {
        "Everything has a default": ("test_config.py::test_a_value", "test_config.py::test_every_field_has_its_cases"),
    },
    "docs/start/trl.md": {
        "are such scripts with the lines marked": ("train/test_scripts.py::test_a_script_runs",),
    },
    "docs/migrate/llama-factory.md": {
        "A file with `use_kt: true` is taken as it is": ("configs/test_configs.py::test_a_users_file_is_understood",),
        "**Refused, with what to write instead**": (
            "train/test_arguments.py::test_a_bad_setting_is_told",
            "train/test_arguments.py::test_llamafactorys_names_are_translated",
        ),
    },
    "kt_hf/train/config/settings.py": {
        "`false` trains the same file": (
            "train/test_train_command.py::test_it_succeeds_and_tells_what_it_does",
        ),
        "On DeepSeek's latent attention q_proj": (
            "train/test_targets.py::test_names_of_plain_attention_mean_what_latent_attention_has",
        ),
        "A folder with an earlier run is refused without it": (
            "train/test_arguments.py::test_an_earlier_run_is_not_written_over_by_accident",
            "train/test_run.py::test_earlier_checkpoints_are_cleared_only_when_asked",
        ),
    },
    "docs/cli.md": {
        "has every option and an example": ("cli/test_verbs.py::test_a_verb_has_help_with_an_example",),
        "130 stopped by Ctrl-C": (
            "train/test_interrupt.py::test_it_stops_after_the_step_with_a_checkpoint_that_resumes",
        ),
        "host and GPU memory by part": (
            "train/test_estimate.py::test_measured_peaks_are_within_15_percent",
            "train/test_estimate.py::test_what_does_not_fit_comes_with_advice",
        ),
        "a self-test of each backend, and what to mend": (
            "tools/test_doctor.py::test_what_is_wrong_comes_with_a_remedy_and_exit_code_1",
            "tools/test_doctor.py::test_wrong_numbers_are_noticed",
        ),
        "forward and backward of a layer of the model on this machine": (
            "tools/test_bench.py::test_it_measures_the_models_shape",
        ),
        "a real model, trained and checked in minutes": (
            "demo/test_demo.py::test_a_fast_run_passes_and_prints_nothing_but_its_story",
        ),
        "all that is wrong is reported at once, with line numbers": (
            "train/test_arguments.py::test_a_bad_setting_is_told",
        ),
        "The format is recognized by the columns": ("train/test_data.py::test_a_format_is_recognised_by_its_columns",),
        "and stop the run above 1 %": ("train/test_data.py::test_its_malformed_twin_is_refused_above_one_percent",),
        "The loss is on the answers": (
            "train/test_run.py::test_only_the_answer_is_trained",
            "train/test_run.py::test_every_answer_is_trained_where_the_template_marks_them",
            "train/test_run.py::test_else_the_last_answer_is_and_that_is_told",
        ),
        "nothing of one is dropped unnamed": (
            "train/test_data_tokens.py::test_what_the_template_leaves_out_is_named_once",
            "train/test_data_rows.py::test_columns_that_nobody_uses_are_named_once",
            "train/test_data_rows.py::test_what_cannot_be_used_is_refused_by_name",
            "train/test_data_tokens.py::test_a_row_that_is_cut_is_told",
        ),
        "are those of TRL's own preparation": ("train/test_data_tokens.py::test_tokens_and_labels_are_trls",),
        "is refused at once, and so": ("train/test_data_info.py::test_the_hub_out_of_reach_is_a_sentence_at_once",),
        "Its log-probabilities are computed once": ("train/test_arguments.py::test_the_reference_is_computed_once",),
        "A second one stops at once": ("train/test_interrupt.py::test_twice_stops_at_once",),
    },
    "docs/gpu.md": {
        "with one wait for the": ("backends/gpu/test_transfer.py::test_nothing_waits_in_secret",),
        "the adapter is the same whatever the": (
            "placement/test_order.py::test_the_adapter_does_not_know_where_experts_ran",
            "backends/test_three_tiers.py::test_the_adapter_does_not_know",
        ),
        "puts the most used on the GPU": (
            "train/test_gpu_experts.py::test_profile_then_the_checkpoints",
            "placement/test_order.py::test_the_most_used_come_first",
        ),
        "takes the profile of a checkpoint, to resume as it was": (
            "placement/test_order.py::test_resumed_run_keeps_the_placement",
        ),
        "before it is logged or saved": (
            "backends/gpu/test_tiered.py::test_an_output_that_is_not_finite_is_told_before_the_next_step",
            "backends/gpu/test_transfer.py::test_doubts_come_late_and_surely",
        ),
        "Optimizers of bitsandbytes": ("backends/gpu/test_training.py::test_optimizers_of_bitsandbytes",),
        "to the same bits as loading does": (
            "backends/test_8_bits.py::test_every_kind_to_the_bit",
            "backends/gpu/test_8_bits.py::test_large_matrices_are_widened_to_the_bit",
        ),
        "experts without tokens are not copied": (
            "backends/test_streamed.py::test_experts_without_rows_are_not_copied",
        ),
        "a refusal is an error that says so": ("backends/gpu/test_streamed.py::test_a_refusal_is_told",),
        "takes the split whose slowest part is the fastest": (
            "placement/test_planner.py::test_it_is_the_best_there_is",
        ),
        "after five steps of training": ("monitoring/test_tier_times.py::test_what_a_plan_took",),
        "more than a tenth faster than one without": (
            "placement/test_planner.py::test_experts_are_left_to_the_cpu_for_more_than_a_tenth",
        ),
        "as many experts left to them as a token is sent to, or none": (
            "placement/test_planner.py::test_the_operators_need_as_many_as_a_token_is_sent_to",
            "backends/test_three_tiers.py::test_too_many",
        ),
    },
    "docs/loading.md": {
        "do, to the bit": (
            "checkpoint/test_equal.py::test_numbers",
            "checkpoint/test_equal.py::test_everything_else",
        ),
        "one layer at a time": ("checkpoint/test_memory.py::test_peak",),
        "is refused by file and tensor before anything is loaded": (
            "checkpoint/test_broken.py::test_it_is_refused_by_name_before_anything_is_loaded",
        ),
        "the next one read while one is packed": ("checkpoint/test_equal.py::test_layers_are_read_one_ahead",),
        "`kt_lora_rank` is needed": ("checkpoint/test_arguments.py::test_the_operators_need_a_rank",),
        "or fused, in one file or sharded": ("checkpoint/test_sources.py::test_fused",),
        "to the bit what compressed-tensors": (
            "checkpoint/test_sources.py::test_8_bits_are_dequantised",
            "checkpoint/test_sources.py::test_other_quantisation_is_refused",
        ),
        "The error names file and tensor": (
            "checkpoint/test_broken.py::test_it_is_refused_by_name_before_anything_is_loaded",
        ),
        "`kt-hf train` falls back to those with a warning": (
            "train/test_streamed_loading.py::test_experts_under_unknown_names_are_refused",
        ),
    },
    "docs/quantized.md": {
        "`auto` never chooses them": ("backends/test_registry.py::test_auto_never_quantises",),
        "the same results to the bit": ("quantized/test_folder.py::test_saved_is_online_to_the_bit",),
        "the model's own expert weights are not read": (
            "quantized/test_folder.py::test_the_original_experts_are_not_read",
        ),
        "memory of W bytes of bf16 weights": (
            "train/test_estimate.py::test_experts_take_what_their_arithmetic_takes",
        ),
        "so INT4 cannot compute it, and says so": (
            "backends/test_registry.py::test_each_arithmetic_has_its_multiples",
        ),
    },
    "docs/kernel-contract.md": {
        "made of the packed forward ones at each backward": (
            f"{_K}test_contract_of_int8.py::test_backward_weights_that_are_shared_are_made_of_the_packed_ones",
        ),
        "and computes the same to the bit": (
            f"{_K}test_contract_of_int8.py::test_saved_weights_are_the_online_ones_to_the_bit",
        ),
        "Files that are missing or short raise": (
            f"{_K}test_contract_of_int8.py::test_a_file_that_is_not_whole_raises",
            "quantized/test_folder.py::test_broken_folders_and_wrong_settings_are_refused",
            "quantized/test_quantize.py::test_a_disk_that_fills_up_is_noticed",
        ),
        "Each worker is pinned to a core and named": (
            f"{_K}test_contract.py::test_workers_have_names_and_a_core_each",
        ),
        "at the end of the process nowhere": ("process_life/test_exit.py::test_end",),
    },
    "docs/performance.md": {
        "file descriptors and threads constant": ("end_to_end/test_soak.py::test_five_hundred_steps",),
        "benchmarks/results.csv": ("benchmarks/test_scripts.py::test_the_page_is_made_of_the_csv",),
    },
}  # fmt: skip
