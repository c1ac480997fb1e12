"""The mutants of `mutants.py`: wrong programs that no generator of mutants would write.

A row is a function, a part of its source, what replaces that part, and the test that must fail. A
function is named with its class (`Importance.add`) and without its module (a table of a module by
the module), and line breaks do not count: a row outlives a move and a change elsewhere.
"""

from __future__ import annotations

MUTANTS = [
    # Masks, and what is a sample: tokens in windows, windows in texts.
    (
        "LayerHooks.__init__",
        "self._ends = mask.sum(1) - 1",
        "self._ends = torch.full_like(mask.sum(1), mask.shape[1] - 1)",
        "test_ragged_padded_batches_equal_single_windows",
    ),
    (
        "inner",
        "with torch.autocast(x.device.type, enabled=False), full_float32():",
        "with full_float32():",
        "test_the_arithmetic_of_the_hooks_is_that_of_float64_on_the_same_states",
    ),
    (
        "LayerHooks.reduce",
        "torch.where(self._mask, torch.stack(each), 0.0).sum(3)",
        "torch.stack(each).sum(3)",
        "test_ragged_padded_batches_equal_single_windows",
    ),
    (
        "Importance.block_influence",
        "self.influence.sum(0) / self.tokens.sum()",
        "(self.influence / self.tokens[:, None]).mean(0)",
        "test_the_mean_is_over_tokens_not_over_windows",
    ),
    (
        "Importance.add",
        "(torch.arange(len(tokens)) + self.n_windows) % 2",
        "torch.arange(len(tokens)) % 2",
        "test_windows_fall_alternately_into_the_halves_whatever_the_batches",
    ),
    (
        "Importance.covariance",
        "return residual @ self.products @ residual.T *",
        "m = self.influence.sum(0); return (self.products[:-1, :-1] - torch.outer(m, m) / n) *",
        "test_the_error_of_ragged_windows_is_that_of_a_ratio",
    ),
    (
        "difference_margins",
        "importance.sampling_covariance",
        "importance.covariance",
        "test_the_margin_is_that_of_the_difference_over_texts_else_windows",
    ),
    (
        "ratio_covariance",
        "sums.sum(0) / total * sizes[:, None]",
        "sums.mean(0)",
        "test_the_covariance_is_that_of_leaving_out_one_cluster_after_the_other",
    ),
    (
        "add_texts",
        "if number is None: return None",
        "number = number or 0",
        "test_texts_are_the_samples_where_there_are_several",
    ),
    (
        "measure",
        "[None if text is None else first_text + text for text in texts])",
        "None)",
        "test_texts_are_the_samples_where_there_are_several",
    ),
    (
        "sampling_error",
        "key = index if count in (None, 1) else int(sample.text or 0)",
        "key = index",
        "test_the_error_over_texts_is_the_jackknifes",
    ),
    (
        "Importance.margin",
        "t_quantile(0.975, self.degrees)",
        "1.0",
        "test_the_intervals_of_the_ranking_are_95_percent_ones",
    ),
    (
        "Trials.__init__",
        "max(0, len(window) - first_predicted(window))",
        "len(window)",
        "test_sleb_equals_the_plain_loop",
    ),
    (
        "_predicted",
        "mask[:, 1:].clone()",
        "torch.ones_like(mask[:, 1:])",
        "test_ragged_windows_weigh_by_their_tokens",
    ),
    (
        "measured",
        "torch.where(predicted, values, 0.0).sum(1)",
        "values.sum(1)",
        "test_windows_of_any_lengths_give_the_same_alone_and_in_batches",
    ),
    (
        "first_predicted",
        "window.start if isinstance(window, Answer) else 1",
        "1",
        "test_the_prompt_of_an_answer_is_only_read",
    ),
    (
        "collate",
        "torch.full_like(tokens, IGNORED)",
        "torch.zeros_like(tokens)",
        "test_padding_is_no_target",
    ),
    # Pairs: the same text, the same layers, the right one less the other.
    (
        "difference",
        "getattr(b, by) - getattr(a, by)",
        "getattr(a, by) - getattr(b, by)",
        "test_paired_difference_and_its_error",
    ),
    (
        "kl_divergence",
        "(other.exp() * (other - own))",
        "(own.exp() * (other - own))",
        "test_a_pruned_model_is_as_far_from_the_original_as_its_plain_logits_say",
    ),
    (
        "Reference.logits",
        "batch[row, : len(state)] = state",
        "batch[row, -len(state) :] = state",
        "test_windows_of_any_lengths_give_the_same_alone_and_in_batches",
    ),
    (
        "_row",
        "gain = difference(dense, healed), difference(raw, healed)",
        "gain = difference(dense, healed), difference(dense, healed)",
        "test_what_healing_brings_is_paired_with_the_same_layers_raw",
    ),
    # Hidden states: whose they are, and which ones.
    (
        "choose",
        "[importance.layers[i] for i in row.choose",
        "[i for i in row.choose",
        "test_each_takes_its_layers_in_original_numbers",
    ),
    (
        "Importance._sum",
        "if self.layers != other.layers:",
        "if len(self.layers) != len(other.layers):",
        "test_scores_of_different_layers_do_not_add",
    ),
    (
        "_refit_layers",
        "batches.run_all(removed, target, target)",
        "pass",
        "test_in_the_model_that_is_left_every_matrix_solves_its_normal_equations",
    ),
    (
        "LayerRefit.run_pruned",
        'leaving = self._with_mlp(batch, self.projections["mlp"])',
        "leaving = self._target[batch]",
        "test_in_the_model_that_is_left_every_matrix_solves_its_normal_equations",
    ),
    (
        "LayerRefit._read_mlp",
        "if batch in batches.fitted: yield tokens(batch, inputs, outputs)",
        "if True: yield tokens(batch, inputs, outputs)",
        "test_the_ridge_is_chosen_by_the_windows_kept_apart",
    ),
    (
        "StreamedCalls.loaded",
        "if self._ready is not layer or not complete:",
        "if self._ready is None:",
        "test_one_layer_at_a_time_gives_the_matrices_of_the_model_in_memory[meta]",
    ),
    # The teacher and what is learned from it.
    (
        "_with_gradient",
        "value += rest.exp() * (",
        "value += 0 * rest.exp() * (",
        "test_what_is_not_kept_is_one_event_more",
    ),
    (
        "Targets.normalized",
        "torch.logaddexp(self.logs.logsumexp(-1), self.rest)",
        "self.logs.logsumexp(-1)",
        "test_rounded_probabilities_sum_to_one_again",
    ),
    (
        "Distillation.targets",
        "mapped[self._ends[i] : self._ends[i + 1]]",
        "mapped[: self._ends[1]]",
        "test_what_is_read_is_what_the_model_predicts",
    ),
    (
        "_targets",
        "Targets.of(logits[:-1], k, temperature)",
        "Targets.of(logits[1:], k, temperature)",
        "test_what_is_read_is_what_the_model_predicts",
    ),
    (
        "Distillation._scale",
        "self.kl_share * self.temperature**2",
        "self.kl_share",
        "test_a_batchs_loss_is_the_mean_over_its_tokens_and_padding_does_not_count",
    ),
    (
        "Distillation.loss",
        "labels[1 : count + 1]",
        "labels[:count]",
        "test_a_batchs_loss_is_the_mean_over_its_tokens_and_padding_does_not_count",
    ),
    (
        "Distillation.collate",
        '["labels"][:, 0] = IGNORED',
        '["labels"][:, 0] += 0',
        "test_a_batchs_loss_is_the_mean_over_its_tokens_and_padding_does_not_count",
    ),
    (
        "_trainer",
        "model_accepts_loss_kwargs = True",
        "model_accepts_loss_kwargs = False",
        "test_a_step_divides_by_the_tokens_of_all_its_parts",
    ),
    # Texts that must share nothing.
    ("_check", "check_disjoint(run.training, run.validation)", "pass", "test_healing_refused"),
    # What a model without layers says of itself, in memory and in its files.
    (
        "MetaDecoder.keep_layers.put",
        "self.model.n_layers = self.model.params.n_layers = len(layers)",
        "self.model.n_layers = len(layers)",
        "test_removal_edits_every_place_and_undo_restores_them",
    ),
    (
        "HFDecoder._edits",
        "dict.fromkeys(old, new)",
        "dict.fromkeys(old, number)",
        "test_contract[llama-generation]",
    ),
    (
        "stored_names",
        "{prefix}.{new_number[int(match[1])]}.{match[2]}",
        "{prefix}.{int(match[1])}.{match[2]}",
        "test_pruned_again_it_remembers_the_first_time",
    ),
    (
        "Provenance._original",
        "return [before[layer] for layer in layers]",
        "return list(layers)",
        "test_numbers_go_through_all_removals_to_the_first_model",
    ),
    (
        "Stack.records",
        "sum(i < leading for i in keep)",
        "leading",
        "test_what_speaks_of_positions_is_adjusted",
    ),
    (
        "Stack.records",
        "[not self._kind(i) for i in keep]",
        "[not self._kind_at(i) for i in range(len(keep))]",
        "test_what_speaks_of_positions_is_adjusted",
    ),
    # Weights that change their place or their format.
    (
        "_stored",
        "permute_rows(weight, count, to_neighbours=True)",
        "permute_rows(weight, count, to_neighbours=False)",
        "test_every_weight_goes_back_to_where_it_came_from",
    ),
    (
        "HFCheckpoint.read",
        "return permute(name, weight, self.args, to=META)",
        "return weight",
        "test_hugging_faces_format_gives_the_same_file",
    ),
    (
        "MetaSource.rows",
        "start = max(start - len(weight), 0)",
        "start = 0",
        "test_a_meta_directory_gives_the_scores_of_the_model_in_memory_bit_for_bit",
    ),
    (
        "StreamedLlama.save",
        "replaced=new, tokenizer_path=path)",
        "replaced=None, tokenizer_path=path)",
        "test_one_layer_at_a_time_gives_the_matrices_of_the_model_in_memory[meta]",
    ),
    # What is proved before it takes its place, and taken back after an error.
    (
        "check_same_logits",
        "same = torch.equal(actual, expected)",
        "same = torch.allclose(actual, expected)",
        "test_what_makes_two_models_the_same",
    ),
    (
        "check_same",
        "if not theirs.consistent:",
        "if False:",
        "test_what_makes_two_models_the_same",
    ),
    (
        "save_meta.verify",
        "target.prove(partial)",
        "pass",
        "test_a_patched_meta_checkpoint_is_proved_before_it_is_there",
    ),
    (
        "save_meta.verify",
        "weight.data = weight.data.to(infos[name].dtype).to(weight.dtype)",
        "pass",
        "test_a_patched_meta_checkpoint_is_proved_before_it_is_there",
    ),
    (
        "HealingJob.save",
        "clear(self.work_dir)",
        "shutil.rmtree(self.work_dir)",
        "test_a_chain_does_what_its_steps_do_and_is_recorded_as_one",
    ),
    # What a run continues from: identities, digests, locks.
    (
        "RunState.unread",
        '!= self._saved.get("texts")',
        "is None",
        "test_a_refused_state_is_left_as_it_is_and_refused_again",
    ),
    (
        "RefitState.leaving",
        "return self._turns[model][(self.done + 1) % 2]",
        "return self._turns[model][self.done % 2]",
        "test_an_interrupted_refit_goes_on_bit_for_bit_and_does_nothing_twice[1]",
    ),
    (
        "Distillation.__init__",
        "joined(known, digest, {",
        "joined(known, {",
        "test_predictions_of_something_else_are_refused",
    ),
    (
        "TrainingRun.identity",
        "taught = {} if self.distillation is None else self.distillation.identity()",
        "taught = {}",
        "test_resuming_gives_what_one_run_gives",
    ),
    (
        "hold",
        "lock is not None and lock.process == os.getpid()",
        "lock is not None",
        "test_a_fork_neither_has_the_lock_nor_takes_it_away",
    ),
    # A choice of layers: what judges is not what is fitted on, and luck is no gain.
    (
        "_Choosing._refitted",
        "with self._healed(layers, calibration=self._fit):",
        "with self._healed(layers, calibration=[*self._fit, *self._judging]):",
        "test_candidates_are_judged_by_their_refit_on_windows_that_it_does_not_read",
    ),
    # Ranks and replicas.
    (
        "Replicas._part",
        "(batch_size % 2 and self.count > 1)",
        "0",
        "test_shares_are_disjoint_whole_and_in_step",
    ),
    (
        "Replicas.summed",
        "dist.all_reduce(total, group=groups.get_data_parallel_group())",
        "pass",
        "test_any_division_gives_the_sums_of_one_process",
    ),
    (
        "NormalEquations.add_up",
        "self.square, tokens = team.summed(counts).tolist()",
        "self.square, tokens = counts.tolist()",
        "test_processes_that_share_the_windows_solve_the_matrices_of_one",
    ),
    (
        "_Writer.texts",
        "for part in team.gather(texts):",
        "for part in [texts]:",
        "test_processes_share_the_texts_that_a_model_writes",
    ),
    (
        "_trainer.Healer.compute_loss",
        "return loss * self.accelerator.num_processes",
        "return loss",
        "test_two_processes_train_as_one_with_the_whole_batch[distill]",
    ),
]
