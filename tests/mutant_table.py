"""The mutants of `mutants.py`: wrong programs that no generator of mutants would write.

A row is a function and the test that must fail, then a part of the function's source, and what
replaces that part. A function is named with its class (`Importance.add`) and without its module (a
table of a module by the module), and line breaks do not count: a row outlives a move and a change
elsewhere.
"""

from __future__ import annotations

TABLE = r"""
# Masks, and what is a sample: tokens in windows, windows in texts.
LayerHooks.__init__: test_ragged_padded_batches_equal_single_windows
- self._ends = mask.sum(1) - 1
+ self._ends = torch.full_like(mask.sum(1), mask.shape[1] - 1)
inner: test_the_arithmetic_of_the_hooks_is_that_of_float64_on_the_same_states
- with torch.autocast(x.device.type, enabled=False), full_float32():
+ with full_float32():
LayerHooks.reduce: test_ragged_padded_batches_equal_single_windows
- torch.where(self._mask, torch.stack(each), 0.0).sum(3)
+ torch.stack(each).sum(3)
Importance.block_influence: test_the_mean_is_over_tokens_not_over_windows
- self.influence.sum(0) / self.tokens.sum()
+ (self.influence / self.tokens[:, None]).mean(0)
Importance.add: test_windows_fall_alternately_into_the_halves_whatever_the_batches
- (torch.arange(len(tokens)) + self.n_windows) % 2
+ torch.arange(len(tokens)) % 2
Importance.covariance: test_the_error_of_ragged_windows_is_that_of_a_ratio
- return residual @ self.products @ residual.T *
+ m = self.influence.sum(0); return (self.products[:-1, :-1] - torch.outer(m, m) / n) *
Importance.standard_error: test_texts_are_the_samples_where_there_are_several
- self.sampling_covariance
+ self.covariance
ratio_covariance: test_the_covariance_is_that_of_leaving_out_one_cluster_after_the_other
- sums.sum(0) / total * sizes[:, None]
+ sums.mean(0)
add_texts: test_texts_are_the_samples_where_there_are_several
- if number is None: return None
+ number = number or 0
measure: test_texts_are_the_samples_where_there_are_several
- [None if text is None else first_text + text for text in texts])
+ None)
sampling_error: test_the_error_over_texts_is_the_jackknifes
- key = index if count in (None, 1) else int(sample.text or 0)
+ key = index
Trials.__init__: test_sleb_equals_the_plain_loop
- sum(evaluated(window))
+ len(window)
_predicted: test_ragged_windows_weigh_by_their_tokens
- mask[:, 1:].clone()
+ torch.ones_like(mask[:, 1:])
evaluated: test_the_prompt_of_an_answer_is_only_read
- window if isinstance(window, Answer) else [*window]
+ [*window]
collate: test_of_a_dialog_the_answers_alone_are_learned
- torch.full_like(tokens, IGNORED)
+ torch.zeros_like(tokens)
# Pairs: the same text, the same layers, the right one less the other.
difference: test_a_change_of_one_window_has_no_error
- getattr(b, by) - getattr(a, by)
+ getattr(a, by) - getattr(b, by)
kl_divergence: test_a_pruned_model_is_as_far_from_the_original_as_its_plain_logits_say
- (other.exp() * (other - own))
+ (own.exp() * (other - own))
Reference.logits: test_windows_of_any_lengths_give_the_same_alone_and_in_batches
- batch[row, : len(state)] = state
+ batch[row, -len(state) :] = state
_row: test_what_healing_brings_is_paired_with_the_same_layers_raw
- difference(sets.perplexities(layers), healed)
+ difference(sets.perplexities([]), healed)
# Hidden states: whose they are, and which ones.
choose: test_each_takes_its_layers_in_original_numbers
- [importance.layers[i] for i in row.choose
+ [i for i in row.choose
_refit_layers: test_in_the_model_that_is_left_every_matrix_solves_its_normal_equations
- batches.run_all(removed, target, target)
+ pass
LayerRefit.run_pruned: test_in_the_model_that_is_left_every_matrix_solves_its_normal_equations
- leaving = self._with_mlp(batch, self.projections["mlp"])
+ leaving = self._target[batch]
LayerRefit._read_mlp: test_the_ridge_is_chosen_by_the_windows_kept_apart
- if batch in batches.fitted: yield tokens(batch, inputs, outputs)
+ if True: yield tokens(batch, inputs, outputs)
StreamedCalls.loaded: test_one_layer_at_a_time_gives_the_matrices_of_the_model_in_memory[meta]
- if self._ready is not layer or not complete:
+ if self._ready is None:
# The teacher and what is learned from it.
_with_gradient: test_what_is_not_kept_is_one_event_more
- value += rest.exp() * (
+ value += 0 * rest.exp() * (
Distillation.targets: test_what_is_read_is_what_the_model_predicts
- mapped[self._ends[i] : self._ends[i + 1]]
+ mapped[: self._ends[1]]
Distillation._scale: test_a_batchs_loss_is_the_mean_over_its_tokens_and_padding_does_not_count
- self.kl_share * self.temperature**2
+ self.kl_share
collate: test_a_batchs_loss_is_the_mean_over_its_tokens_and_padding_does_not_count
- ids.where(counted, IGNORED)
+ ids
_trainer: test_a_step_divides_by_the_tokens_of_all_its_parts
- model_accepts_loss_kwargs = True
+ model_accepts_loss_kwargs = False
# Texts that must share nothing.
_check: test_healing_refused
- check_disjoint(run.training, run.validation)
+ pass
# What a model without layers says of itself, in memory and in its files.
MetaDecoder.keep_layers.put: test_removal_edits_every_place_and_undo_restores_them
- self.model.n_layers = self.model.params.n_layers = len(layers)
+ self.model.n_layers = len(layers)
HFDecoder._edits: test_contract[llama-generation]
- dict.fromkeys(old, new)
+ dict.fromkeys(old, number)
stored_names: test_pruned_again_it_remembers_the_first_time
- {prefix}.{new_number[int(match[1])]}.{match[2]}
+ {prefix}.{int(match[1])}.{match[2]}
Provenance._original: test_numbers_go_through_all_removals_to_the_first_model
- return [before[layer] for layer in layers]
+ return list(layers)
Stack.records: test_what_speaks_of_positions_is_adjusted
- sum(i < leading for i in keep)
+ leading
# Weights that change their place or their format.
_stored: test_every_weight_goes_back_to_where_it_came_from
- permute_rows(weight, count, to_neighbours=True)
+ permute_rows(weight, count, to_neighbours=False)
HFCheckpoint.read: test_hugging_faces_format_gives_the_same_file
- return permute(name, weight, self.args, to=META)
+ return weight
MetaSource.rows: test_a_meta_directory_gives_the_scores_of_the_model_in_memory_bit_for_bit
- start = max(start - len(weight), 0)
+ start = 0
StreamedLlama.save: test_one_layer_at_a_time_gives_the_matrices_of_the_model_in_memory[meta]
- replaced=new, tokenizer_path=path)
+ replaced=None, tokenizer_path=path)
# What is proved before it takes its place, and taken back after an error.
check_same_logits: test_what_makes_two_models_the_same
- same = torch.equal(actual, expected)
+ same = torch.allclose(actual, expected)
save_meta.verify: test_a_patched_meta_checkpoint_is_proved_before_it_is_there
- target.prove(partial)
+ pass
HealingJob.save: test_a_chain_does_what_its_steps_do_and_is_recorded_as_one
- clear(self.work_dir)
+ shutil.rmtree(self.work_dir)
# What a run continues from: identities, digests, locks.
RunState.unread: test_a_refused_state_is_left_as_it_is_and_refused_again
- != self._saved.get("texts")
+ is None
RefitState.leaving: test_an_interrupted_refit_goes_on_bit_for_bit_and_does_nothing_twice[1]
- return self._turns[model][(self.done + 1) % 2]
+ return self._turns[model][self.done % 2]
Distillation.__init__: test_predictions_of_something_else_are_refused
- joined(known, digest, {
+ joined(known, {
TrainingRun.identity: test_resuming_gives_what_one_run_gives
- taught = {} if self.distillation is None else self.distillation.identity()
+ taught = {}
hold: test_a_fork_neither_has_the_lock_nor_takes_it_away
- lock is not None and lock.process == os.getpid()
+ lock is not None
# A choice of layers: what judges is not what is fitted on, and luck is no gain.
_Choosing._refitted: test_candidates_are_judged_by_their_refit_on_windows_that_it_does_not_read
- with self._healed(layers, calibration=self._fit):
+ with self._healed(layers, calibration=[*self._fit, *self._judging]):
# Ranks and replicas.
Replicas._part: test_shares_are_disjoint_whole_and_in_step
- (batch_size % 2 and self.count > 1)
+ 0
Replicas.summed: test_any_division_gives_the_sums_of_one_process
- dist.all_reduce(total, group=groups.get_data_parallel_group())
+ pass
NormalEquations.add_up: test_processes_that_share_the_windows_solve_the_matrices_of_one
- self.square, tokens = team.summed(counts).tolist()
+ self.square, tokens = counts.tolist()
_trainer.Healer.compute_loss: test_two_processes_train_as_one_with_the_whole_batch[distill]
- return loss * self.accelerator.num_processes
+ return loss
"""
LINES = [line for line in TABLE.split("\n") if line and line[0] != "#"]
MUTANTS = [
    (head.split(": ")[0], old.removeprefix("- "), new.removeprefix("+ "), head.split(": ")[1])
    for head, old, new in zip(LINES[::3], LINES[1::3], LINES[2::3], strict=True)
]
