"""The wrong lines of `mutants.py`, by the file that has them and the tests that guard it.

A row is a part of the file that it has once, what stands there instead, and the test that must
fail: its name, or a whole node id where the test is in another file than the section's.
"""

from __future__ import annotations

from typing import NamedTuple

Row = tuple[str, str, str]


class Section(NamedTuple):
    """Wrong lines of one file, and the file of tests whose names the rows give."""

    file: str
    tests: str
    rows: tuple[Row, ...]


IMPORTANCE = "tests/scoring/test_importance.py"

SCORING = (
    Section(
        "short_gpt/scoring/metrics.py",
        "tests/scoring/test_metrics.py",
        (
            ("return 1.0 - cos", "return 1.0 + cos", "test_known_answers"),
            ("cos.arccos() / math.pi", "cos.arccos()", "test_known_answers"),
            ("cos.clamp(-1.0, 1.0)", "cos", "test_equal_vectors_are_never_nan"),
            (
                "return x if x.dtype in (torch.float32, torch.float64) else x.float()",
                "return x",
                "test_norms_beyond_float16_are_scored_right",
            ),
            (
                "(x_norm == y_norm).to(xy.dtype)",
                "torch.ones_like(xy)",
                "test_known_answers",
            ),
            (
                "gram.diagonal(dim1=1, dim2=2).sqrt()",
                "gram.diagonal(dim1=1, dim2=2)",
                "test_distances_of_all_pairs_are_those_of_single_pairs",
            ),
            (
                "else states).double()",
                "else states).float()",
                "test_distances_of_all_pairs_are_those_of_single_pairs",
            ),
            (
                "angles.diagonal(dim1=1, dim2=2).zero_()",
                "angles.diagonal(dim1=1, dim2=2)",
                f"{IMPORTANCE}::test_angular_distances_are_a_metric_on_directions",
            ),
            (
                "relative_change(norms(y - x), norms(y))",
                "relative_change(norms(y - x), norms(x))",
                "test_the_parts_that_hooks_call_are_the_equations",
            ),
            (
                "(change / norm).masked_fill(change == 0, 0.0)",
                "change / norm",
                "test_what_adds_nothing_to_nothing_has_magnitude_zero",
            ),
            (
                "from scipy.stats import spearmanr",
                "from scipy.stats import pearsonr as spearmanr",
                "test_spearman_is_pearson_of_mean_ranks",
            ),
        ),
    ),
    Section(
        "short_gpt/scoring/halves.py",
        IMPORTANCE,
        (
            (
                "return middle if whole else None",
                "return middle",
                "test_halves_that_do_not_add_up_to_the_layer_are_not_scored",
            ),
        ),
    ),
    Section(
        "short_gpt/scoring/hooks.py",
        IMPORTANCE,
        (
            (
                "self._ends = mask.sum(1) - 1",
                "self._ends = torch.full_like(mask.sum(1), mask.shape[1] - 1)",
                "test_ragged_padded_batches_equal_single_windows",
            ),
            (
                "torch.where(self._mask, torch.stack(each), 0.0).sum(3)",
                "torch.stack(each).sum(3)",
                "test_ragged_padded_batches_equal_single_windows",
            ),
            (
                "version = version_of(state) if state is self._state else None",
                "version = version_of(state)",
                "test_squares_are_computed_anew_where_the_state_is_another",
            ),
            (
                "version_of(result), y_norm",
                "version_of(result), x_norm",
                "test_scores_equal_those_of_stored_states",
            ),
            (
                "influence(cosine_from_product(my, m_norm, y_norm))",
                "influence(cosine_from_product(my, x_norm, y_norm))",
                "test_the_halves_of_a_layer_are_scored_around_its_attention_and_its_mlp",
            ),
            (
                "[s[row, :length] for s in self._kept]",
                "[s[row] for s in self._kept]",
                "test_distances_at_all_tokens_equal_those_of_stored_states",
            ),
            (
                "            handle.remove()",
                "            pass",
                "test_hooks_are_gone_even_after_an_error",
            ),
            (
                "bad.nonzero()[:, 1].argmin()",
                "bad.nonzero()[:, 1].argmax()",
                "test_a_state_that_is_not_finite_names_its_layer_and_counts_nothing",
            ),
        ),
    ),
    Section(
        "short_gpt/scoring/importance.py",
        IMPORTANCE,
        (
            (
                "t_quantile(0.975, self.degrees)",
                "1.0",
                "tests/cli/test_tables.py::test_the_intervals_of_the_ranking_are_95_percent_ones",
            ),
            (
                "(torch.arange(len(tokens)) + self.n_windows) % 2",
                "torch.arange(len(tokens)) % 2",
                "test_windows_fall_alternately_into_the_halves_whatever_the_batches",
            ),
            (
                "getattr(scores, f.name).cpu().double()",
                "getattr(scores, f.name).cpu().half().double()",
                "test_scores_equal_those_of_stored_states",
            ),
            (
                "self.influence.sum(0) / self.tokens.sum()",
                "(self.influence / self.tokens[:, None]).mean(0)",
                "test_the_mean_is_over_tokens_not_over_windows",
            ),
            # the estimator of a mean over windows of one length, for windows of any
            (
                "return residual @ self.products @ residual.T *",
                "m = self.influence.sum(0); "
                "return (self.products[:-1, :-1] - torch.outer(m, m) / n) *",
                "test_the_error_of_ragged_windows_is_that_of_a_ratio",
            ),
            (
                "torch.cat((eye, -self.block_influence[:, None]), dim=1)",
                "torch.cat((eye, self.block_influence[:, None]), dim=1)",
                "test_standard_errors_are_those_of_window_means",
            ),
            (
                "(n / (n - 1) / self.tokens.sum() ** 2)",
                "(1 / self.tokens.sum() ** 2)",
                "test_standard_errors_are_those_of_window_means",
            ),
            (
                "(second - torch.outer(mean, mean)) / (count - 1)",
                "(second - torch.outer(mean, mean)) / count",
                "test_the_covariance_of_blocks_is_that_of_the_windows_distances",
            ),
            (
                "self.angles / self.windows.sum()",
                "self.angles / self.tokens.sum()",
                "test_scores_equal_those_of_stored_states",
            ),
            (
                "self.token_angles / self.tokens.sum()",
                "self.token_angles / self.windows.sum()",
                "test_distances_at_all_tokens_equal_those_of_stored_states",
            ),
            (
                "self.norm / self.tokens.sum()",
                "self.norm / self.windows.sum()",
                "test_magnitude_and_norm_equal_those_of_stored_states",
            ),
            (
                "first, second = self.influence / self.tokens[:, None]",
                "first, second = self.influence[[0, 0]] / self.tokens[:, None]",
                "test_agreement_of_halves",
            ),
            (
                "if self.layers != other.layers:",
                "if len(self.layers) != len(other.layers):",
                "test_scores_of_different_layers_do_not_add",
            ),
        ),
    ),
    Section(
        "short_gpt/scoring/order.py",
        "tests/selection/test_selection.py",
        (
            (
                "_finite(scores).argsort(stable=True)[:n]",
                "_finite(scores).argsort(stable=True, descending=True)[:n]",
                "test_published_vectors_give_the_published_lists",
            ),
            (
                "_finite(scores).argsort(stable=True)[:n]",
                "(len(scores) - 1 - _finite(scores).flip(0).argsort(stable=True))[:n]",
                "test_ties_go_to_the_lower_layer",
            ),
            (
                "_finite(angular.diagonal(n))",
                "_finite(angular.diagonal(n)[:-1])",
                "test_every_block_size_and_the_last_start_are_candidates",
            ),
            (
                "return list(range(start, start + n))",
                "return list(range(start + 1, start + n + 1))",
                "test_published_vectors_give_the_published_lists",
            ),
            (
                "range(n_layers - 1 - n, n_layers - 1)",
                "range(n_layers - n, n_layers)",
                "test_rules_without_scores",
            ),
            (
                "if not scores.isfinite().all():",
                "if scores.isinf().any():",
                "test_nan_is_never_selected",
            ),
        ),
    ),
    Section(
        "short_gpt/scoring/state.py",
        "tests/scoring/test_resume.py",
        (
            (
                ' != found.get("texts")',
                " is None",
                "test_a_state_of_other_windows_is_refused",
            ),
            (
                "if count < read:",
                "if count > read:",
                "test_fewer_windows_than_were_read_are_refused_and_other_batches_go_on",
            ),
        ),
    ),
)

STOPPING = (
    Section(
        "short_gpt/scoring/stopping.py",
        "tests/scoring/test_stopping.py",
        (
            # no correction for looking again and again, at windows without end and with
            ("1 / (look * (look + 1))", "1 / 2", "test_who_looked_more_often_needs_more"),
            (
                "share = 1 / (self.looks(population - 1, population) + 1)",
                "share = 1.0",
                "test_more_looks_and_more_layers_ask_for_more",
            ),
            (
                "* (1 - self.confidence) * share",
                "* 10 * (1 - self.confidence) * share",
                "test_more_looks_and_more_layers_ask_for_more",
            ),
            (
                " / max(skewness.shape[-1] - 1, 1)",
                "",
                "test_more_looks_and_more_layers_ask_for_more",
            ),
            (
                "t - CAUTION * skewness",
                "t - 0 * skewness",
                "test_windows_that_lean_towards_another_answer_ask_for_more",
            ),
            (
                "(3 * left + (1 + left) * (t * t - 1)) / 6",
                "(3 * left + (1 + left) * (t * t - 1)) / 12",
                "test_windows_that_lean_towards_another_answer_ask_for_more",
            ),
            (
                "missed *= max(population - kind - read, 0) / (population - read)",
                "missed *= 1 - kind / population",
                "test_enough_windows_to_see_a_rare_kind",
            ),
            (
                "max(0.0, 1 - read / population)",
                "1.0",
                "test_the_finite_population_correction",
            ),
            (
                "(z - needed).argmin()",
                "(z - needed).argmax()",
                "test_of_equal_layers_hardly_any_is_settled_however_often_one_looks",
            ),
            (
                "read >= self.first_look(population) and ",
                "",
                "test_fewer_windows_than_the_minimum_never_settle",
            ),
        ),
    ),
    Section(
        "short_gpt/scoring/moments.py",
        "tests/scoring/test_stopping.py",
        (
            ("- 2 * covariance)", "- covariance)", "test_z_of_pairs_by_hand"),
            (
                "3 * (cubes - cubes.mT)",
                "3 * (cubes + cubes.mT)",
                "test_the_skewness_of_differences_is_that_of_the_windows",
            ),
            (
                "found + 2 * i * j * each",
                "found - 2 * i * j * each",
                "test_the_skewness_of_differences_is_that_of_the_windows",
            ),
        ),
    ),
)

SELECTION = (
    Section(
        "short_gpt/selection/methods.py",
        "tests/selection/test_methods.py",
        (
            (
                "lowest(-scores.mean_norm, n)",
                "lowest(scores.mean_norm, n)",
                "test_each_takes_its_layers_in_original_numbers",
            ),
            (
                "best_block(scores.angular_all_tokens, n)",
                "best_block(scores.angular, n)",
                "test_each_takes_its_layers_in_original_numbers",
            ),
            (
                "[importance.layers[i] for i in",
                "[i for i in",
                "test_each_takes_its_layers_in_original_numbers",
            ),
            (
                "at_random(len(scores.layers), n, seed)",
                "at_random(len(scores.layers), n)",
                "test_random_layers_by_their_seed",
            ),
        ),
    ),
    Section(
        "short_gpt/selection/found.py",
        "tests/selection/test_greedy.py",
        (
            (
                "for i in range(1, count - 1) if i in places]",
                "for i in range(count) if i in places]",
                "test_numbers_out_of_range",
            ),
        ),
    ),
    Section(
        "short_gpt/selection/search.py",
        "tests/selection/test_greedy.py",
        (
            (
                "sorted(loss, key=lambda i: (loss[i], i))[:n]",
                "sorted(loss, key=lambda i: (-loss[i], i))[:n]",
                "test_one_shot_takes_the_layers_whose_absence_alone_costs_least",
            ),
        ),
    ),
    Section(
        "short_gpt/selection/trials.py",
        "tests/selection/test_greedy.py",
        (
            # states beyond what memory was given for
            (
                "options.max_memory // size - 2",
                "options.max_memory // size + 50",
                "test_the_states_held_fit_into_the_memory_given",
            ),
            (
                "for i, states in self._stored.items() if i <= front",
                "for i, states in self._stored.items()",
                "test_sleb_equals_the_plain_loop",
            ),
            (
                "best = min(nats, key=lambda i: (nats[i], i))",
                "best = max(nats, key=lambda i: (nats[i], i))",
                "test_sleb_equals_the_plain_loop",
            ),
            (
                "if i != j]",
                "if i >= j]",
                "test_sleb_equals_the_plain_loop",
            ),
            (
                "if i not in self.result.removed]",
                "if i not in self.result.removed[:-1]]",
                "test_sleb_equals_the_plain_loop",
            ),
            (
                "int(mask[:, 1:].sum()) for _, mask in",
                "int(mask.sum()) for _, mask in",
                "test_sleb_equals_the_plain_loop",
            ),
        ),
    ),
    Section(
        "short_gpt/selection/perplexity_budget.py",
        "tests/selection/test_perplexity_budget.py",
        (
            (
                "return self.bounds(n)[1] <= self.ratio",
                "return not self.bounds(n)[1] > self.ratio",
                "test_no_number_holds_no_ratio",
            ),
            (
                "            break\n",
                "            continue\n",
                "test_a_better_removal_behind_one_that_is_too_bad_is_not_reached",
            ),
            (
                "return self.bounds(n)[1] <= self.ratio",
                "return self.bounds(n)[0] <= self.ratio",
                "test_the_ratio_holds_with_its_error",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/comparison_cells.py",
        "tests/jobs/test_comparison.py",
        (
            (
                "correlation = spearman(",
                "correlation = 0 * spearman(",
                "test_agreement_is_that_of_the_scores_with_each_other_and_with_the_losses",
            ),
            (
                "len(sets[a] & sets[b]) / n",
                "len(sets[a] | sets[b]) / n",
                "test_agreement_is_that_of_the_scores_with_each_other_and_with_the_losses",
            ),
            (
                "gain = difference(dense, parts), difference(raw, parts)",
                "gain = difference(dense, parts), difference(dense, parts)",
                "test_what_healing_brings_is_paired_with_the_same_layers_raw",
            ),
        ),
    ),
)

SURGERY = (
    Section(
        "short_gpt/models/layer_removal.py",
        "tests/models/test_layer_removal.py",
        (
            (
                "    check_layers(drop, range(count))\n",
                "",
                "test_bad_lists_change_nothing",
            ),
            (
                "        undo()\n",
                "        pass\n",
                "test_a_trial_gives_the_model_back_even_after_an_error",
            ),
        ),
    ),
    Section(
        "short_gpt/models/meta.py",
        "tests/models/test_layer_removal.py",
        (
            (
                "self.model.n_layers = self.model.params.n_layers = len(layers)",
                "self.model.n_layers = len(layers)",
                "test_removal_edits_every_place_and_undo_restores_them",
            ),
            (
                "return lambda: put(before)",
                "return lambda: None",
                "test_removal_edits_every_place_and_undo_restores_them",
            ),
        ),
    ),
    Section(
        "short_gpt/models/hf.py",
        "tests/wrappers/test_short_hf.py",
        (
            (
                "dict.fromkeys(old, place)",
                "dict.fromkeys(old, number)",
                "test_contract[llama-generation]",
            ),
            (
                "            for target, old, _ in edits:\n                target.update(old)\n",
                "",
                "test_contract[llama-undo]",
            ),
        ),
    ),
    Section(
        "short_gpt/wrappers/sublayers.py",
        "tests/wrappers/test_sublayers.py",
        (
            (
                "removed + [_Sublayer(i, 1, mlp_output(",
                "removed + [_Sublayer(i, 1, attention_output(",
                "test_the_logits_are_those_of_layers_without_the_half",
            ),
            (
                "                setattr(module, name, value)\n",
                "                pass\n",
                "test_the_logits_are_those_of_layers_without_the_half",
            ),
        ),
    ),
    Section(
        "short_gpt/models/prefill.py",
        "tests/models/test_prefill.py",
        (
            (
                "attention.update_cache(apply_rotary_emb(k, freqs_cis), v, start_pos)",
                "attention.update_cache(k, v, start_pos)",
                "test_the_skipped_layer_caches_rotated_keys",
            ),
            (
                "if start_pos is None or S == 1:",
                "if start_pos is None:",
                "test_the_prompt_passes_by_and_decoding_runs_all_layers",
            ),
            (
                "attention(hidden_states=norm(x), **kwargs)",
                "attention(hidden_states=x, **kwargs)",
                "test_both_formats_decode_alike",
            ),
        ),
    ),
)

HEALING = (
    Section(
        "short_gpt/healing/moments.py",
        "tests/healing/test_linear_patch.py",
        (
            (
                "ridge * self.gram.trace() / len(self.gram)",
                "ridge * self.gram.trace()",
                "test_the_solution_is_the_minimum_and_the_share_is_what_it_leaves",
            ),
            (
                "(inputs.T @ rest).cpu()",
                "(rest.T @ inputs).cpu()",
                "test_a_linear_map_is_recovered",
            ),
            (
                "dtype=torch.float64) + change, self",
                "dtype=torch.float64) - change, self",
                "test_a_linear_map_is_recovered",
            ),
            (
                "left = self.square - 2 * (",
                "left = self.square - (",
                "test_the_solution_is_the_minimum_and_the_share_is_what_it_leaves",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/refit_pass.py",
        "tests/healing/test_refit.py",
        (
            (
                "self._move(windows, range(place + 1, after), whole, to=whole)",
                "self._move(windows, [], whole, to=whole)",
                "test_in_the_model_that_is_left_every_matrix_solves_its_normal_equations",
            ),
            (
                "if place == self._start > 0:",
                "if False:",
                "test_in_the_model_that_is_left_every_matrix_solves_its_normal_equations",
            ),
            (
                "self._start = max(min(gone) - 1, 0)",
                "self._start = min(gone)",
                "test_in_the_model_that_is_left_every_matrix_solves_its_normal_equations",
            ),
            (
                "left[batch] = embedded",
                "pass",
                "test_the_first_layers_may_go_and_halves_may_be_left_alone",
            ),
            (
                "left[batch] = embedded",
                "left[batch] = 0 * embedded",
                "test_the_first_layers_may_go_and_halves_may_be_left_alone",
            ),
            (
                "for place, after in [*zip(self._kept, ends, strict=True)][self.state.done :]:",
                "for place, after in [*zip(self._kept, ends, strict=True)]:",
                "tests/healing/test_refit_streamed.py::test_an_interrupted_refit_goes_on_bit_for_bit_and_does_nothing_twice[1-True]",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/refit_layer.py",
        "tests/healing/test_refit.py",
        (
            (
                'behind = self._added(batch, self.ends["mlp"])',
                "behind = self._whole[batch]",
                "test_in_the_model_that_is_left_every_matrix_solves_its_normal_equations",
            ),
            (
                'between if "mlp" in self.ends else between - whole',
                "between",
                "test_in_the_model_that_is_left_every_matrix_solves_its_normal_equations",
            ),
            (
                "else between + self._whole[batch]",
                "else between",
                "test_in_the_model_that_is_left_every_matrix_solves_its_normal_equations",
            ),
            (
                'if self._solving.weights == "inverse":',
                'if self._solving.weights == "equal":',
                "test_in_the_model_that_is_left_every_matrix_solves_its_normal_equations",
            ),
            (
                "return (stream + out.view_as(stream))",
                "return (stream - out.view_as(stream))",
                "test_in_the_model_that_is_left_every_matrix_solves_its_normal_equations",
            ),
            (
                "if not windows.held[batch]:\n                    yield replace(",
                "if True:\n                    yield replace(",
                "test_the_ridge_is_chosen_by_the_windows_kept_apart",
            ),
            (
                "if self._known is not None:  # nothing",
                "if False:  # nothing",
                "tests/healing/test_refit_streamed.py::test_of_a_streamed_layer_the_last_matrices_alone_are_left_while_the_mlps_is_solved",
            ),
            (
                "own.callback(keep_values(",
                "id(keep_values(",
                "test_every_family_is_read_only_refitted_and_put_back_bit_for_bit",
            ),
            (
                "windows.calls.keep_only(self._place, last)",
                "pass",
                "tests/healing/test_refit_streamed.py::test_of_a_streamed_layer_the_last_matrices_alone_are_left_while_the_mlps_is_solved",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/known_attention.py",
        "tests/healing/test_known_attention.py",
        (
            (
                "self.proved = torch.equal(calls.run(place, state), expected)",
                "self.proved = True",
                "test_an_attention_that_gives_more_than_its_matrix_is_not_taken_for_known",
            ),
            (
                "self.proved = torch.equal(calls.run(place, state), expected)",
                "self.proved = False",
                "test_behind_its_solution_an_attention_is_not_computed_again",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/half.py",
        "tests/healing/test_half.py",
        (
            (
                "squares = self.target.pow(2).sum(1)",
                "squares = 1 / self.target.pow(2).sum(1)",
                "tests/healing/test_refit.py::test_in_the_model_that_is_left_every_matrix_solves_its_normal_equations",
            ),
            (
                "(tokens.target - tokens.stream) / end.factor - end.normed(given)",
                "(tokens.target - tokens.stream) * end.factor - end.normed(given)",
                "tests/healing/test_refit.py::test_in_the_model_that_is_left_every_matrix_solves_its_normal_equations",
            ),
            (
                "inputs = inputs / _rms(given)",
                "inputs = inputs * _rms(given)",
                "test_a_matrix_behind_which_a_norm_stands_is_brought_near_what_gave_the_targets",
            ),
            (
                "if left < self._left:",
                "if True:",
                "test_what_would_raise_the_error_on_tokens_kept_apart_is_not_taken",
            ),
            (
                "change if scale is None else change * scale[columns]",
                "change",
                "test_a_matrix_behind_which_a_norm_stands_is_brought_near_what_gave_the_targets",
            ),
            (
                "crosses += (w * unit * rest)",
                "crosses += (unit * rest)",
                "test_the_weight_of_a_norm_that_was_scaled_is_found_back",
            ),
            (
                "sums.square <= noise**2 * sums.tokens",
                "sums.square <= noise * sums.tokens",
                "test_what_a_token_lacks_by_rounding_alone_is_not_solved",
            ),
            (
                "sums.square <= noise**2 * sums.tokens or not",
                "not",
                "test_what_a_token_lacks_by_rounding_alone_is_not_solved",
            ),
            (
                "taken = restore  # the former best's copy goes before there is another",
                "pass",
                "test_a_wide_matrix_is_solved_beside_two_copies_of_it_and_a_block_of_columns",
            ),
            (
                "_add(bias[columns], change[-1])",
                "_add(bias[columns], change[0])",
                "test_a_matrix_behind_which_a_norm_stands_is_brought_near_what_gave_the_targets",
            ),
            (
                "            taken()",
                "            pass",
                "test_a_matrix_behind_which_a_norm_stands_is_brought_near_what_gave_the_targets",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/normal_equations.py",
        "tests/healing/test_half.py",
        (
            (
                "(rows @ inputs[:, start:]).cpu()",
                "(rows @ inputs[:, start:]).cpu() * 2",
                "test_the_sums_in_blocks_solve_the_normal_equations",
            ),
            (
                "block.copy_(above + above.T)",
                "block.copy_(above)",
                "test_the_sums_in_blocks_solve_the_normal_equations",
            ),
            (
                "self._gram[end:, start:end] = self._gram[start:end, end:].T",
                "pass",
                "test_the_sums_in_blocks_solve_the_normal_equations",
            ),
            (
                " + aim**2 * penalty * size",
                "",
                "test_the_sums_in_blocks_solve_the_normal_equations",
            ),
            (
                "aim * (2 - aim) * given",
                "aim * given",
                "tests/healing/test_refit.py::test_in_the_model_that_is_left_every_matrix_solves_its_normal_equations",
            ),
            (
                "torch.from_numpy(aim * change)",
                "torch.from_numpy(change)",
                "tests/healing/test_refit.py::test_in_the_model_that_is_left_every_matrix_solves_its_normal_equations",
            ),
            (
                "range(0, self._cross.shape[1], COLUMNS)",
                "range(0, self._cross.shape[1], COLUMNS + 1)",
                "test_the_sums_in_blocks_solve_the_normal_equations",
            ),
            (
                "COLUMNS = 256",
                "COLUMNS = 256**2",
                "test_a_wide_matrix_is_solved_beside_two_copies_of_it_and_a_block_of_columns",
            ),
            (
                "        self._fill(diagonal)\n        room",
                "        room",
                "test_a_matrix_that_is_not_positive_by_rounding_is_solved_all_the_same",
            ),
            (
                "None if failed else lambda columns: whole[:, columns]",
                "None if failed else lambda columns: whole[:, : columns.stop - columns.start]",
                "test_a_matrix_that_is_not_positive_by_rounding_is_solved_all_the_same",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/refit_state.py",
        "tests/healing/test_refit_streamed.py",
        (
            (
                "return self._pairs[name][(self.done + 1) % 2]",
                "return self._pairs[name][self.done % 2]",
                "test_an_interrupted_refit_goes_on_bit_for_bit_and_does_nothing_twice[1-True]",
            ),
            (
                "            self._stored.read(self.folder / name)",
                "            pass",
                "test_an_interrupted_refit_goes_on_bit_for_bit_and_does_nothing_twice[2-True]",
            ),
            (
                "                    path.unlink()",
                "                    pass",
                "test_an_interrupted_refit_goes_on_bit_for_bit_and_does_nothing_twice[1-True]",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/refit_memory.py",
        "tests/healing/test_refit_streamed.py",
        (
            (
                "return max((read, made, solved), key",
                "return min((read, made, solved), key",
                "test_a_llama_2_7b_is_refitted_within_3_gb",
            ),
            (
                "if max_memory is not None and room < 0:",
                "if False:",
                "test_too_little_memory_or_disk_is_said_before_anything_is_done",
            ),
            (
                "if needed > free + held:",
                "if False:",
                "test_too_little_memory_or_disk_is_said_before_anything_is_done",
            ),
            (
                "filter(is_own, folder",
                "filter(Path.is_file, folder",
                "test_of_the_disk_a_refits_own_files_alone_count_as_free",
            ),
            (
                "disk += fits * solved",
                "disk += solved",
                "test_all_fits_of_the_best_one_need_room_for_what_they_solve",
            ),
        ),
    ),
    Section(
        "short_gpt/wrappers/streamed_transformer.py",
        "tests/healing/test_refit_streamed.py",
        (
            (
                '            self._ready.to("meta")',
                "            pass",
                "test_one_layer_at_a_time_gives_the_matrices_of_the_model_in_memory[meta]",
            ),
            (
                "            if not kept.intersection(module.parameters()):",
                "            if False:",
                "test_of_a_streamed_layer_the_last_matrices_alone_are_left_while_the_mlps_is_solved",
            ),
            (
                "self._model.release(name for",
                "tuple(name for",
                "test_of_a_streamed_layer_the_last_matrices_alone_are_left_while_the_mlps_is_solved",
            ),
            (
                "        model.release()",
                "        pass",
                "test_of_a_streamed_layer_the_last_matrices_alone_are_left_while_the_mlps_is_solved",
            ),
            (
                "if self._ready is not layer or not whole:",
                "if self._ready is None:",
                "test_one_layer_at_a_time_gives_the_matrices_of_the_model_in_memory[meta]",
            ),
        ),
    ),
    Section(
        "short_gpt/wrappers/streamed_llama.py",
        "tests/healing/test_refit_streamed.py",
        (
            (
                "verify=self._check_saved if changed else None",
                "verify=None",
                "test_a_directory_that_is_not_the_healed_model_is_not_written",
            ),
            (
                "replaced=new)",
                "replaced=None)",
                "test_one_layer_at_a_time_gives_the_matrices_of_the_model_in_memory[meta]",
            ),
            (
                "[v for v in self.stream.replaced if v is not values]",
                "self.stream.replaced",
                "test_trials_leave_a_streamed_model_as_it_was",
            ),
        ),
    ),
    Section(
        "short_gpt/models/summands.py",
        "tests/healing/test_half.py",
        (
            (
                "if not (_follows(run, matrix, norm) and _is_rms(norm)):",
                "if not _follows(run, matrix, norm):",
                "test_a_norm_behind_is_proved_and_not_believed[gemma2]",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/refit_best.py",
        "tests/healing/test_refit.py",
        (
            (
                "best = min(chain([best], alone), key=loss)",
                "best = max(chain([best], alone), key=loss)",
                "test_settings_are_tried_one_after_the_other_with_what_was_best_before",
            ),
            (
                "best = min(chain([best], others), key=loss)",
                "best = max(chain([best], others), key=loss)",
                "test_settings_are_tried_one_after_the_other_with_what_was_best_before",
            ),
            (
                "best = min((fitted",
                "best = max((fitted",
                "test_settings_are_tried_one_after_the_other_with_what_was_best_before",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/refit.py",
        "tests/healing/test_refit.py",
        (
            (
                "if i not in places]",
                "]",
                "test_every_eighth_window_chooses_the_ridge",
            ),
        ),
    ),
    Section(
        "short_gpt/models/layer_calls.py",
        "tests/healing/test_refit.py",
        (
            (
                "        self.call(place, state)  # seen first",
                "        # seen first",
                "test_in_the_model_that_is_left_every_matrix_solves_its_normal_equations",
            ),
            (
                "if not _equal(ours, theirs):",
                "if False:",
                "test_layers_that_need_the_tokens_are_refused",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/folding.py",
        "tests/healing/test_linear_patch.py",
        (
            (
                "else linear_map.T @ exact",
                "else linear_map @ exact",
                "test_a_layer_linear_in_the_mlp_before_is_restored_exactly",
            ),
            (
                "(bias.detach().cpu().double() @ linear_map)",
                "bias.detach().cpu().double()",
                "test_folded_is_hooked_and_undone[phi]",
            ),
        ),
    ),
    Section(
        "short_gpt/models/numbering.py",
        "tests/healing/test_linear_patch.py",
        (
            (
                "found[-1][1] == place - 1",
                "found[-1][1] == place - 2",
                "test_runs_of_consecutive_layers",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/linear_patch.py",
        "tests/healing/test_linear_patch.py",
        (
            (
                "[here].float()  # M (N, D)",
                ".flatten(0, 1).float()[: int(here.sum())]  # M (N, D)",
                "test_sets_fitted_together_are_those_fitted_alone_and_padding_does_not_count",
            ),
            (
                "        undo()\n        raise\n    return patch",
                "        raise\n    return patch",
                "test_a_patch_whose_layers_cannot_go_leaves_the_weights_alone",
            ),
        ),
    ),
    Section(
        "short_gpt/models/layer_hooks.py",
        "tests/healing/test_linear_patch.py",
        (
            (
                "worst <= 16 * torch.finfo(before.dtype).eps",
                "worst <= 16_000 * torch.finfo(before.dtype).eps",
                "test_the_proof_sees_a_factor_near_one",
            ),
            (
                "if not worst <= 16",
                "if worst > 16",
                "test_the_proof_refuses_what_is_no_number",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/divergence.py",
        "tests/healing/test_divergence.py",
        (
            (
                "    value += rest.exp() * (",
                "    value += 0 * rest.exp() * (",
                "test_what_is_not_kept_is_one_event_more",
            ),
            (
                "q *= (1 - rest.exp() / others)[:, None]",
                "q *= (1 - rest.exp())[:, None]",
                "test_what_is_not_kept_is_one_event_more",
            ),
            (
                "(logs.clamp_min(limits.min) - own)",
                "(logs - own)",
                "test_a_teacher_that_is_certain_and_words_that_cannot_be_give_no_nan",
            ),
            (
                "torch.logaddexp(self.logs.logsumexp(-1), self.rest)",
                "self.logs.logsumexp(-1)",
                "test_rounded_probabilities_sum_to_one_again",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/teacher.py",
        "tests/healing/test_teacher.py",
        (
            (
                "mapped[start:end].view",
                "mapped[: self._ends[1] - DIGEST].view",
                "test_what_is_read_is_what_the_model_predicts",
            ),
            (
                "Targets.of(logits[:-1], k, temperature)",
                "Targets.of(logits[1:], k, temperature)",
                "test_what_is_read_is_what_the_model_predicts",
            ),
            (
                "os.truncate(self._file, self._ends[whole])",
                "pass",
                "test_an_interrupted_cache_goes_on_where_it_was",
            ),
            (
                '{"windows": windows}, own)',
                "own)",
                "test_predictions_of_something_else_are_refused",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/distillation.py",
        "tests/healing/test_distillation.py",
        (
            (
                "self.kl_share * self.teacher.temperature**2",
                "self.kl_share",
                "test_a_batchs_loss_is_the_mean_over_its_tokens_and_padding_does_not_count",
            ),
            (
                "labels[1 : count + 1]",
                "labels[:count]",
                "test_a_batchs_loss_is_the_mean_over_its_tokens_and_padding_does_not_count",
            ),
            (
                'tensors["labels"][:, 0] = IGNORED',
                "pass",
                "test_a_batchs_loss_is_the_mean_over_its_tokens_and_padding_does_not_count",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/trainer.py",
        "tests/healing/test_distillation.py",
        (
            (
                "        trainer.model_accepts_loss_kwargs = True\n",
                "        trainer.model_accepts_loss_kwargs = False\n",
                "test_a_step_divides_by_the_tokens_of_all_its_parts",
            ),
            (
                "joined(own, {} if self.distillation is None else self.distillation.identity())",
                "own",
                "test_resuming_gives_what_one_run_gives",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/closed_forms.py",
        "tests/healing/test_chain.py",
        (
            (
                "        if kept.there:\n",
                "        if False:\n",
                "test_an_interrupted_chain_goes_on_bit_for_bit_and_does_nothing_twice",
            ),
            (
                '"settings": json.loads(json.dumps(vars(self)))',
                '"settings": {}',
                "test_what_was_kept_of_another_run_is_refused",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/job.py",
        "tests/healing/test_chain.py",
        (
            (
                "self._clear(self.work_dir)",
                "shutil.rmtree(self.work_dir)",
                "test_a_chain_does_what_its_steps_do_and_is_recorded_as_one",
            ),
            (
                "        for undo in reversed(undos):\n            undo()\n",
                "",
                "test_all_steps_are_undone_when_a_later_one_fails",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/batching.py",
        "tests/healing/test_healing.py",
        (
            # padding as a target
            (
                "torch.full_like(tokens, IGNORED)",
                "torch.zeros_like(tokens)",
                "test_padding_is_no_target",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/adapters.py",
        "tests/healing/test_healing.py",
        (
            (
                "lora_alpha=recipe.rank if recipe.alpha is None",
                "lora_alpha=1 if recipe.alpha is None",
                "test_without_an_alpha_changes_count_as_they_are",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/lora.py",
        "tests/healing/test_healing.py",
        (
            (
                "kept_step=min(learned, key",
                "kept_step=max(learned, key",
                "test_training_that_only_harms_leaves_the_model_as_it_was",
            ),
            (
                "    check_disjoint(run.training, run.validation)\n",
                "",
                "test_healing_refused",
            ),
        ),
    ),
)

EVALUATION = (
    Section(
        "short_gpt/evaluation/perplexity.py",
        "tests/evaluation/test_evaluate.py",
        (
            (
                "tokens[:, 1:].masked_fill(~mask[:, 1:], -100).flatten()",
                "tokens[:, 1:].flatten()",
                "test_ragged_windows_weigh_by_their_tokens",
            ),
            (
                "exp(self.nats / self.tokens)",
                "exp(self.nats / (self.tokens + self.windows))",
                "test_ragged_windows_weigh_by_their_tokens",
            ),
            (
                "logits = decoder.logits(tokens)[:, :-1]",
                "logits = decoder.logits(tokens)[:, 1:]",
                "test_ragged_windows_weigh_by_their_tokens",
            ),
            (
                "loss.cpu().double()",
                "loss.cpu().half()",
                "test_ragged_windows_weigh_by_their_tokens",
            ),
            (
                "    if not math.isfinite(nats):",
                "    if math.isinf(nats):",
                "test_nan_logits_are_refused",
            ),
        ),
    ),
    Section(
        "short_gpt/evaluation/paired.py",
        "tests/healing/test_healing.py",
        (
            (
                "b.nats - a.nats",
                "a.nats - b.nats",
                "test_paired_difference_and_its_error",
            ),
        ),
    ),
    Section(
        "short_gpt/evaluation/sampling.py",
        "tests/evaluation/test_sampling.py",
        (
            (
                "key = place if known in (None, 1) else int(sample.text or 0)",
                "key = place",
                "test_the_error_over_texts_is_the_jackknifes",
            ),
            (
                "degrees_of_freedom(tokens_of))",
                "len(tokens_of) - 1.0)",
                "test_where_no_interval_is_honest_it_says_so",
            ),
        ),
    ),
    Section(
        "short_gpt/evaluation/drafts.py",
        "tests/evaluation/test_drafts.py",
        (
            (
                "next((i for i, same in enumerate(draft) if not same), len(draft))",
                "sum(draft)",
                "test_the_first_disagreement_ends_a_draft",
            ),
            ("start += right + 1", "start += len(draft)", "test_known_answers"),
            ("[0, start - 1 : -1]", "[0, start:]", "test_a_pair_of_models_of_known_acceptance"),
            (
                "written[: stops[0] + 1] if stops else written",
                "written",
                "test_a_text_ends_where_the_whole_model_ends_it",
            ),
            (
                "if whole.encode(text) != draft.encode(text):",
                "if False:",
                "test_what_cannot_be_compared_is_refused",
            ),
        ),
    ),
    Section(
        "short_gpt/evaluation/protocols.py",
        "tests/evaluation/test_protocols.py",
        (
            (
                "C4_TEXTS, C4_WINDOWS = 1100, 256",
                "C4_TEXTS, C4_WINDOWS = 1100, 257",
                "test_c4_is_256_windows_of_the_first_1100_texts",
            ),
            (
                '"\\n\\n".join(',
                '"\\n".join(',
                "test_wikitext_is_one_text_of_joined_rows",
            ),
        ),
    ),
    Section(
        "short_gpt/data/disjoint.py",
        "tests/healing/test_healing.py",
        (
            (
                "count = len(tokens) - span + 1",
                "count = len(tokens) - span",
                "test_shared_spans_are_found_wherever_they_lie",
            ),
        ),
    ),
    Section(
        "short_gpt/data/windows.py",
        "tests/data/test_data.py",
        (
            (
                "range(0, length - size + 1, stride)",
                "range(0, length - size, stride)",
                "test_windows_of_a_known_text",
            ),
            (
                "    random.Random(seed).shuffle(found)\n",
                "",
                "test_the_seeded_order_is_this_one_everywhere",
            ),
        ),
    ),
)

CHECKPOINTS = (
    Section(
        "short_gpt/checkpoints/meta.py",
        "tests/reference_llama/test_checkpoint.py",
        (
            (
                "layers.{new_number[match[1]]}.{match[2]}",
                "layers.{match[1]}.{match[2]}",
                "test_pruned_checkpoint_equals_the_model_pruned_in_memory",
            ),
            (
                '{**params, "n_layers": n_layers}',
                "dict(params)",
                "test_pruned_checkpoint_equals_the_model_pruned_in_memory",
            ),
        ),
    ),
    Section(
        "short_gpt/checkpoints/hf.py",
        "tests/checkpoints/test_hf_checkpoint.py",
        (
            (
                "{prefix}.{new_number[int(match[1])]}.{match[2]}",
                "{prefix}.{int(match[1])}.{match[2]}",
                "test_pruned_again_it_remembers_the_first_time",
            ),
            (
                "    decoder.keep_layers(keep)\n    after",
                "    after",
                "test_the_config_changes_in_nothing_but_the_layers",
            ),
            (
                '    config.pop("auto_map", None)',
                '    config.get("auto_map", None)',
                "test_code_that_does_not_go_along_is_not_named",
            ),
        ),
    ),
    Section(
        "short_gpt/checkpoints/verify.py",
        "tests/checkpoints/test_provenance.py",
        (
            (
                "bool(difference <= rounding * expected.abs().max())",
                "bool(difference <= 100 * rounding * expected.abs().max())",
                "test_what_makes_two_models_the_same",
            ),
            (
                "same = torch.equal(actual, expected)",
                "same = torch.allclose(actual, expected)",
                "test_what_makes_two_models_the_same",
            ),
            (
                "if theirs.cached != theirs.uncached:",
                "if ours.cached != ours.uncached:",
                "test_what_makes_two_models_the_same",
            ),
        ),
    ),
    Section(
        "short_gpt/checkpoints/provenance.py",
        "tests/checkpoints/test_provenance.py",
        (
            (
                "return [before[layer] for layer in layers]",
                "return list(layers)",
                "test_numbers_go_through_all_removals_to_the_first_model",
            ),
            (
                "return [*before, *self._original(self.removed_layers)]",
                "return [*self._original(self.removed_layers), *before]",
                "test_numbers_go_through_all_removals_to_the_first_model",
            ),
        ),
    ),
)

BIT_FOR_BIT = "test_a_meta_directory_gives_the_scores_of_the_model_in_memory_bit_for_bit"
STREAMING = (
    Section(
        "short_gpt/wrappers/streamed_transformer.py",
        "tests/wrappers/test_streaming.py",
        (
            (
                "rows[self.tokens[inside] - start]",
                "rows[(self.tokens[inside] - start).clamp(min=1)]",
                f"{BIT_FOR_BIT}[one file]",
            ),
        ),
    ),
    Section(
        "short_gpt/wrappers/streamed_transformer.py",
        "tests/wrappers/test_streaming.py",
        (
            (
                "torch.logaddexp(every[i], logits.logsumexp(-1))",
                "torch.maximum(every[i], logits.logsumexp(-1))",
                f"{BIT_FOR_BIT}[one file]",
            ),
            (
                "(row >= 0) & (row < len(weight))",
                "(row < len(weight))",
                f"{BIT_FOR_BIT}[one file]",
            ),
            (
                "self._normed(batch.state[:, :-1])",
                "batch.state[:, :-1]",
                f"{BIT_FOR_BIT}[one file]",
            ),
            (
                "if not total.isfinite() and not ready.isfinite().all():",
                "if total.isinf():",
                "test_nan_is_found_where_it_begins",
            ),
        ),
    ),
    Section(
        "short_gpt/wrappers/streamed_weights.py",
        "tests/wrappers/test_streaming.py",
        (
            (
                "parts.append(shards[rank].read(name)[at : at + end - start])",
                "parts.append(shards[rank].read(name)[: end - start])",
                f"{BIT_FOR_BIT}[two files, cut by vocabulary]",
            ),
            (
                "for shard in shards], 1)",
                "for shard in reversed(shards)], 1)",
                f"{BIT_FOR_BIT}[two files, cut by width]",
            ),
            (
                "return permute(name, self._files[hf_name].read(hf_name), self.args, to=META)",
                "return self._files[hf_name].read(hf_name)",
                "test_a_hugging_face_directory_too[one file-1000000000]",
            ),
        ),
    ),
    Section(
        "short_gpt/runtime/memory.py",
        "tests/wrappers/test_streaming.py",
        (
            (
                "1 << (batches.bit_length() - 1)",
                "batches",
                "test_several_rounds_are_one_round",
            ),
            (
                "most = on_cpu if on_host else MOST_ON_DEVICE",
                "most = MOST_WINDOWS if on_host else MOST_ON_DEVICE",
                "test_a_round_on_the_cpu_has_no_more_tokens_than_hide_the_reading",
            ),
            (
                "int(float(match[1]) * UNITS[match[2]])",
                "int(float(match[1])) * UNITS[match[2]]",
                "test_sizes",
            ),
        ),
    ),
)

CLI_HF = "tests/cli/test_cli_hf.py"

SHORTAGES = "tests/cli/test_shortages.py"

PROOFS = (
    Section(
        "short_gpt/cli/streams.py",
        SHORTAGES,
        (
            (
                "            self.flush()\n            return len(text)",
                "            raise",
                "test_a_stream_whose_reader_has_left_takes_what_is_written",
            ),
            (
                'errors="backslashreplace"',
                'errors="strict"',
                "test_a_terminal_that_knows_ascii_alone_gets_the_text_all_the_same",
            ),
        ),
    ),
    Section(
        "short_gpt/runtime/errors.py",
        SHORTAGES,
        (
            (
                "return None if error.__cause__ is None else shortage(error.__cause__)",
                "return None",
                "test_a_shortage_behind_another_error_is_told",
            ),
            (
                "if any(part in first for part in NO_SPACE):",
                "if False:",
                "test_a_full_disk_is_one_line_and_leaves_nothing",
            ),
        ),
    ),
    Section(
        "short_gpt/runtime/state.py",
        "tests/runtime/test_state.py",
        (
            (
                "if found[CHECKED] != content_digest(found):",
                "if False:",
                "test_what_was_edited_or_damaged_is_refused",
            ),
        ),
    ),
    Section(
        "short_gpt/scoring/differences.py",
        "tests/scoring/test_differences.py",
        (
            (
                "importance.sampling_covariance",
                "importance.covariance",
                "test_the_margin_is_that_of_the_difference_over_texts_else_windows",
            ),
            (
                "(1 + confidence) / 2",
                "confidence",
                "test_the_margin_is_that_of_the_difference_over_texts_else_windows",
            ),
            (
                "pair_spread(importance.sampling_covariance).sqrt()",
                "pair_spread(importance.sampling_covariance)",
                "test_the_margin_is_that_of_the_difference_over_texts_else_windows",
            ),
        ),
    ),
    Section(
        "short_gpt/scoring/following.py",
        "tests/scoring/test_following.py",
        (
            (
                "time.monotonic() < self._next:",
                "False:",
                "test_it_tells_at_the_beginning_and_then_only_after_a_while",
            ),
            ("read < 2 or", "", "test_of_one_window_there_is_nothing_to_tell"),
            (
                "if self._stops and verdict.windows < first:",
                "if verdict.windows < first:",
                "test_where_all_windows_are_read_nothing_is_needed",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/paper_order.py",
        "tests/jobs/test_reproduce.py",
        (
            (
                "if self.difference > 0",
                "if self.difference < 0",
                "test_pairs_of_the_list_are_borne_out_reversed_or_within_the_error",
            ),
            (
                "not abs(self.difference) > self.margin",
                "abs(self.difference) <= self.margin",
                "test_from_one_window_no_order_follows",
            ),
            (
                "float(scores[b] - scores[a])",
                "float(scores[a] - scores[b])",
                "test_pairs_of_the_list_are_borne_out_reversed_or_within_the_error",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/published.py",
        "tests/jobs/test_reproduce.py",
        (
            (
                "sum(a == b for a, b in zip(paper, ours, strict=False))",
                "len(shared)",
                "test_the_reimplementation_removes_the_papers_layers_in_another_order",
            ),
            (
                "angles[: len(angles) - 9 + 1]",
                "angles",
                "test_published_scores_are_those_of_the_list_and_end_where_blocks_do",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/reproduction.py",
        "tests/jobs/test_reproduction.py",
        (
            (
                "answer = Answer(n, confidence=paper.confidence, rare=paper.rare)",
                "answer = Answer(n, confidence=None)",
                "test_it_ends_when_the_papers_number_of_layers_is_settled",
            ),
            (
                "if given is None and shape.kv_heads != shape.n_heads:",
                "if False:",
                "test_other_models_are_refused_by_name_before_they_are_loaded",
            ),
            (
                "        saving=saving,\n",
                "",
                "test_stopped_and_continued_the_file_has_the_same_bytes",
            ),
            (
                "        running=running,\n",
                "",
                "test_every_kind_of_source_gives_the_scores_of_rank",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/forecast.py",
        "tests/jobs/test_reproduction.py",
        (
            ("(first - read) * one", "first * one", "test_the_forecast_is_windows_times_seconds"),
            (
                "rest if first is None else chain([first], rest)",
                "rest",
                "test_looking_at_the_first_window_loses_none",
            ),
        ),
    ),
    Section(
        "short_gpt/models/shape.py",
        "tests/models/test_shape.py",
        (
            (
                "getattr(text, GROUPED, None) or heads",
                "heads",
                "test_a_config_says_the_shape",
            ),
            (
                "2 * self.vocab_size * self.dim",
                "self.vocab_size * self.dim",
                "test_the_parameters_are_the_published_numbers",
            ),
        ),
    ),
    Section(
        "short_gpt/scoring/clusters.py",
        "tests/scoring/test_clusters.py",
        (
            (
                "sums.sum(0) / total * sizes[:, None]",
                "sums.mean(0)",
                "test_the_covariance_is_that_of_leaving_out_one_cluster_after_the_other",
            ),
            (
                "(count - 1) / count",
                "1",
                "test_the_covariance_is_that_of_leaving_out_one_cluster_after_the_other",
            ),
            (
                "if texts is None or None in of:",
                "if texts is None:",
                f"{IMPORTANCE}::test_texts_are_the_samples_where_there_are_several",
            ),
        ),
    ),
    Section(
        "short_gpt/scoring/measuring.py",
        IMPORTANCE,
        (
            (
                "into.add(scores, [None if text is None else first_text + text for text in texts])",
                "into.add(scores)",
                "test_texts_are_the_samples_where_there_are_several",
            ),
        ),
    ),
    Section(
        "short_gpt/checkpoints/records.py",
        "tests/checkpoints/test_provenance.py",
        (
            (
                "base = _named(source) or entries.get(BASE)",
                "base = entries.get(BASE)",
                "test_the_card_carries_licence_and_base_model",
            ),
        ),
    ),
    Section(
        "short_gpt/checkpoints/provenance.py",
        "tests/checkpoints/test_provenance.py",
        (
            (
                "Measured(perplexity.value, perplexity.tokens, _error(perplexity))",
                "Measured(perplexity.value, perplexity.tokens)",
                "test_record_and_card_carry_the_intervals",
            ),
        ),
    ),
    Section(
        "short_gpt/cli/app.py",
        "tests/cli/test_cli.py",
        (
            (
                'f"--{m[1]}" if m[1] in flags else m[0]',
                'f"--{m[1]}"',
                "test_the_shell_is_told_of_the_commands_own_flags",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/healing.py",
        "tests/data/test_bos.py",
        (
            (
                "bos=learned.bos or short.bos",
                "bos=short.bos",
                "test_heal_and_compare_cut_as_they_are_told",
            ),
        ),
    ),
    Section(
        "llama/io/files.py",
        "tests/reference_llama/test_checkpoint.py",
        (
            (
                "if any(part.is_symlink() for part in (target, *target.parents)):",
                "if False:",
                "test_an_output_that_is_a_circle_of_links",
            ),
        ),
    ),
    Section(
        "llama/io/outputs.py",
        "tests/reference_llama/test_checkpoint.py",
        (
            (
                "tidy(resolved(path))",
                "tidy(path.resolve())",
                "test_an_output_that_is_a_circle_of_links",
            ),
            (
                "tidy(resolved(paths[0]))",
                "tidy(paths[0].resolve())",
                "test_an_output_that_is_a_circle_of_links",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/healing_settings.py",
        "tests/healing/test_healing.py",
        (
            (
                "RefitSettings(parts, ridges, aim=aim, max_windows=max_windows)",
                "RefitSettings(parts, ridges, max_windows=max_windows)",
                "test_heal_by_refit_a_checkpoint_of_the_same_shapes",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/cases.py",
        "tests/data/test_bos.py",
        (
            (
                "limit, self.seed, bos=self.bos)",
                "limit, self.seed)",
                "test_heal_and_compare_cut_as_they_are_told",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/scores.py",
        "tests/jobs/test_scores.py",
        (
            (
                "theirs.tokenizer not in (None, ours.tokenizer)",
                "False",
                "test_scores_of_another_tokenizer_are_refused_and_told",
            ),
            (
                "Scored.of(model, str(path) if path else None)",
                "Scored.of(model)",
                "test_a_tokenizer_elsewhere_is_looked_for_there",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/job.py",
        "tests/healing/test_job.py",
        (
            (
                "                undos.append(undo)\n",
                "",
                "test_an_error_behind_the_healing_takes_it_back",
            ),
            (
                "        for undo in reversed(undos):",
                "        for undo in ():",
                "test_an_error_behind_the_healing_takes_it_back",
            ),
        ),
    ),
    Section(
        "short_gpt/models/loading.py",
        "tests/models/test_weights_report.py",
        (
            (
                "check_left_out(name, left_out)",
                "check_left_out(name, [])",
                "test_a_gguf_file_of_another_architecture",
            ),
            (
                "check_weights(str(directory), info)",
                "check_weights(str(directory), {})",
                "test_prune_looks_for_every_weight_without_a_proof_too",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/conversion.py",
        CLI_HF,
        (
            (
                "tokenizer_path), verify=proof)",
                "tokenizer_path))",
                "test_a_conversion_that_is_another_model_leaves_the_earlier_one[hf]",
            ),
            (
                "verify, dtype=dtype)",
                "verify)",
                "test_convert_in_every_direction_comes_back_bit_exact",
            ),
        ),
    ),
    Section(
        "short_gpt/checkpoints/save.py",
        "tests/healing/test_job.py",
        (
            (
                """            with _as_stored(short, checkpoint.shards[0]):
                target.prove(partial)""",
                "            pass",
                "test_a_patched_meta_checkpoint_is_proved_before_it_is_there",
            ),
            (
                "with _as_stored(short, checkpoint.shards[0]):",
                "if True:",
                "test_a_patched_meta_checkpoint_is_proved_before_it_is_there",
            ),
            (
                "            weight.data = data\n",
                "            pass\n",
                "test_a_patched_meta_checkpoint_is_proved_before_it_is_there",
            ),
        ),
    ),
)

GGUF_FILES = (
    Section(
        "short_gpt/checkpoints/gguf_layers.py",
        "tests/checkpoints/test_gguf.py",
        (
            (
                "sum(i < leading for i in keep)",
                "leading",
                "test_what_speaks_of_positions_is_adjusted",
            ),
            (
                "[value[i] for i in keep if i < len(value)]",
                "value[: len(keep)]",
                "test_what_stays_is_the_sources_byte_for_byte_under_its_new_number",
            ),
            (
                "not isinstance(value, list) or name in NOT_OF_LAYERS",
                "not isinstance(value, list)",
                "test_what_stays_is_the_sources_byte_for_byte_under_its_new_number",
            ),
            (
                "[not self._kind(i) for i in keep]",
                "[not self._kind_at(i) for i in range(len(keep))]",
                "test_what_speaks_of_positions_is_adjusted",
            ),
            ("(new - i) % every", "(new - i) % 1", "test_what_no_key_can_say_is_refused"),
            (
                "return self.blocks - self.extra",
                "return self.blocks",
                "test_what_no_key_can_say_is_refused",
            ),
            (
                "in (self.blocks, self.blocks - len(removed))",
                "in (self.blocks,)",
                "test_variants_that_llama_cpp_knows_by_their_count_are_refused",
            ),
        ),
    ),
    Section(
        "short_gpt/checkpoints/gguf.py",
        "tests/checkpoints/test_gguf.py",
        (
            (
                "if not _same(pieces, again.chunks(new))",
                "if False",
                "test_what_was_written_wrong_never_takes_its_place",
            ),
        ),
    ),
    Section(
        "short_gpt/checkpoints/target.py",
        "tests/checkpoints/test_gguf.py",
        (
            (
                "return RECORD in read_header(path).fields",
                "return True",
                "test_overwriting_replaces_only_what_was_written_so",
            ),
        ),
    ),
    Section(
        "short_gpt/checkpoints/gguf.py",
        "tests/checkpoints/test_gguf_save.py",
        (
            (
                "permute_rows(weight, count, to_neighbours=True)",
                "permute_rows(weight, count, to_neighbours=False)",
                "test_every_weight_goes_back_to_where_it_came_from",
            ),
            (
                "kind = writable(before.kind, before.shape)",
                "kind = writable(8, before.shape)",
                "test_changed_tensors_keep_their_type_where_it_can_be_written",
            ),
            (
                "short.kept.index(number)",
                "number % len(short.kept)",
                "test_changed_tensors_keep_their_type_where_it_can_be_written",
            ),
        ),
    ),
    Section(
        "short_gpt/models/config_file.py",
        "tests/checkpoints/test_gguf.py",
        (
            (
                '"sliding_attention" if slide else "full_attention"',
                '"full_attention" if slide else "sliding_attention"',
                "test_a_cut_file_is_the_model_cut_in_memory",
            ),
        ),
    ),
    Section(
        "llama/formats/gguf_write.py",
        "tests/checkpoints/test_gguf.py",
        (
            (
                "keys |= changed",
                "keys |= {}",
                "test_what_stays_is_the_sources_byte_for_byte_under_its_new_number",
            ),
            (
                "groups[tensor.part].append(name)",
                "groups[0].append(name)",
                "test_files_in_parts_are_read_and_written",
            ),
            (
                "start = end + -end % like.alignment",
                "start = end",
                "test_with_nothing_removed_the_bytes_are_the_sources",
            ),
        ),
    ),
    Section(
        "llama/io/outputs.py",
        "tests/checkpoints/test_gguf.py",
        (
            (
                "for target in reversed(targets):",
                "for target in targets:",
                "test_nothing_is_left_of_several_files_where_one_cannot_be_placed",
            ),
            (
                "            target.unlink()",
                "            pass",
                "test_nothing_is_left_of_several_files_where_one_cannot_be_placed",
            ),
        ),
    ),
    Section(
        "llama/formats/gguf_from.py",
        "tests/reference_llama/test_gguf_from.py",
        (
            (
                "if not (opened.tied and name == OUTPUT)",
                "if True",
                "test_a_tied_head_is_left_out",
            ),
            (
                "writable(kind, shape) if len(shape) > 1 else F32",
                "writable(kind, shape)",
                "test_matrices_go_to_the_type_asked_for_and_vectors_stay",
            ),
            (
                "permute(name, weights[hf_name].read(hf_name), args, to=META)",
                "weights[hf_name].read(hf_name)",
                "test_hugging_faces_format_gives_the_same_file",
            ),
        ),
    ),
    Section(
        "llama/formats/gguf_vocabulary.py",
        "tests/reference_llama/test_gguf_from.py",
        (
            (
                "-float(rank)",
                "float(rank)",
                "test_a_tokenizer_json_made_from_sentencepiece_gives_its_tokens",
            ),
            (
                "(name == DIGITS) == digits",
                "True",
                "test_there_and_back_are_the_same_weights_and_the_same_tokens",
            ),
            (
                '(name == "llama-bpe") != merges_first',
                "True",
                "test_tokenizers_that_llama_cpp_has_no_name_for_are_refused",
            ),
        ),
    ),
    Section(
        "llama/formats/tokenizers.py",
        "tests/reference_llama/test_tokenizer.py",
        (
            (
                "[pre_tokenizers.Digits(individual_digits=True)] if pre == DIGITS else []",
                "[]",
                "test_pre_tokenizers",
            ),
        ),
    ),
    Section(
        "short_gpt/models/loading.py",
        "tests/cli/test_cli_gguf.py",
        (
            (
                "mend_tokenizer(tokenizer, parts.headers[0])",
                "pass",
                "test_smollms_cut_at_digits_stays_in_every_format",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/healed.py",
        "tests/checkpoints/test_gguf_save.py",
        (
            (
                "len(out_paths(done.out)) > 1",
                "False",
                "test_a_directory_or_several_files_are_not_read_again",
            ),
            (
                "opening.whole(str(done.out), size=size)",
                'opening.whole("plain.gguf", size=size)',
                "test_in_float32_writing_rounds_nothing",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/scores.py",
        "tests/checkpoints/test_gguf_save.py",
        (
            (
                "Stack.open(source).layers",
                "None",
                "test_in_float32_writing_rounds_nothing",
            ),
        ),
    ),
    Section(
        "short_gpt/checkpoints/prune.py",
        "tests/cli/test_cli_gguf.py",
        (
            (
                'write_provenance(folder, record, card=kind == "meta")',
                "write_provenance(folder, record, card=True)",
                "test_prune_writes_metas_format_from_gguf",
            ),
        ),
    ),
    Section(
        "llama/formats/sentencepiece_model.py",
        "tests/reference_llama/test_gguf_from.py",
        (
            (
                "_field(DUMMY_PREFIX, int(self.space_in_front))",
                "_field(DUMMY_PREFIX, 0)",
                "test_there_and_back_are_the_same_weights_and_the_same_tokens",
            ),
            (
                "_field(EXTRA_SPACES, 0)",
                "_field(EXTRA_SPACES, 1)",
                "test_there_and_back_are_the_same_weights_and_the_same_tokens",
            ),
        ),
    ),
)

RANKS = (
    Section(
        "short_gpt/runtime/replicas.py",
        "tests/runtime/test_replicas.py",
        (
            (
                "(batch_size % 2 and self.count > 1)",
                "0",
                "test_shares_are_disjoint_whole_and_in_step",
            ),
            (
                "dist.all_reduce(there, group=groups.get_data_parallel_group())",
                "pass",
                "test_any_division_gives_the_sums_of_one_process",
            ),
        ),
    ),
    Section(
        "short_gpt/runtime/abort.py",
        "tests/runtime/test_replicas.py",
        (
            (
                ", 1) == 1",
                ", 1) >= 1",
                "test_a_failing_rank_ends_all_with_one_message",
            ),
            (
                'isinstance(error, RuntimeError) and "gloo" in str(error)',
                "False",
                "test_who_waits_for_a_killed_rank_ends_and_says_so",
            ),
        ),
    ),
)

CHOICE = (
    Section(
        "short_gpt/healing/gap_refit.py",
        "tests/healing/test_healed_search.py",
        (
            (
                "if b.held == held",
                "if b.held != held",
                "test_in_front_of_a_gap_the_refit_is_that_of_the_whole_refit",
            ),
            (
                "setattr(module, name, parameter)",
                "pass",
                "test_the_model_is_left_as_it_was_to_the_very_parameters",
            ),
            (
                "return (last + 1) * (len",
                "return last * (len",
                "test_evaluations_are_the_layers_run_in_trials_and_in_fits",
            ),
            (
                "for gap, value in self._values.items() if gap in wanted}",
                "for gap, value in self._values.items()}",
                "test_only_gaps_that_a_round_tries_are_held",
            ),
        ),
    ),
    Section(
        "short_gpt/healing/healed_search.py",
        "tests/healing/test_healed_search.py",
        (
            (
                "scored = windows[::SCORED_EVERY]",
                "scored = windows",
                "test_every_fourth_window_scores_and_the_others_are_fitted_on",
            ),
        ),
    ),
    Section(
        "short_gpt/selection/trials.py",
        "tests/healing/test_healed_search.py",
        (
            (
                "self._count_fits(self._gaps_of(candidates, gone))",
                "pass",
                "test_evaluations_are_the_layers_run_in_trials_and_in_fits",
            ),
            (
                "with self._mended(gone):",
                "with self._mended(self.result.removed):",
                "test_losses_are_those_of_models_really_healed",
            ),
            (
                "with self._mended(self.result.removed):",
                "with self._mended([]):",
                "test_losses_are_those_of_models_really_healed",
            ),
        ),
    ),
    Section(
        "short_gpt/selection/many_sets.py",
        "tests/selection/test_many_sets.py",
        (
            (
                "ahead.get(place) if mends and place not in layers else None",
                "None",
                "test_mended_sets_are_those_mended_alone",
            ),
            (
                "run = [i for i in range(place, stop) if alike[i][0]]",
                "run = [*range(place, stop)]",
                "test_losses_are_those_of_each_set_alone_for_half_of_the_layers",
            ),
        ),
    ),
    Section(
        "short_gpt/selection/account.py",
        "tests/selection/test_evolution.py",
        (
            (
                "> self._budget - self.reserve",
                "> self._budget",
                "test_an_account_takes_all_windows_or_none",
            ),
            (
                "self._counted.update(new)",
                "pass",
                "test_the_budget_is_never_exceeded_and_the_best_is_measured_on_all",
            ),
        ),
    ),
    Section(
        "short_gpt/selection/evolution.py",
        "tests/selection/test_evolution.py",
        (
            (
                ") < least:",
                ") > least:",
                "test_the_best_set_of_a_landscape_with_a_trap_is_found",
            ),
            (
                "math.floor(len(every) * settings.share)",
                "len(every)",
                "test_offspring_are_judged_on_few_windows_and_survivors_on_all",
            ),
            (
                "account.reserve = sum(account.costs)",
                "account.reserve = 0",
                "test_the_budget_is_never_exceeded_and_the_best_is_measured_on_all",
            ),
        ),
    ),
    Section(
        "short_gpt/selection/evolved.py",
        "tests/selection/test_evolution.py",
        (
            (
                "for i in alive if i > j)",
                "for i in alive if i >= j)",
                "test_it_runs_no_more_layers_than_the_greedy_search",
            ),
            (
                "all(len(layers) == n",
                "all(len(layers)",
                "test_messages",
            ),
            (
                "if place not in gone]",
                "if place not in gone[1:]]",
                "test_the_loss_is_that_of_the_model_without_the_layers",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/peer_maps.py",
        "tests/jobs/test_peer_maps.py",
        (
            (
                "self._ratios += sizes[1] / sizes[0]",
                "self._ratios += sizes[0] / sizes[1]",
                "test_gaps_that_a_map_can_express_are_restored_exactly",
            ),
            (
                "behind.float() - before.float())",
                "behind.float())",
                "test_gaps_that_a_map_can_express_are_restored_exactly",
            ),
            (
                "self._windows += 1",
                "self._windows = 1",
                "test_the_scale_is_the_mean_of_the_ratios_of_windows",
            ),
            (
                "return hooks.close",
                "return id",
                "test_gaps_that_a_map_can_express_are_restored_exactly",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/comparison_cells.py",
        "tests/jobs/test_comparison.py",
        (
            (
                "n if method in AS_SETS else most or n",
                "most or n",
                "test_evolution_is_run_for_every_number",
            ),
            (
                "fitted_on=self._calibration[len(self._few) :]",
                "fitted_on=self._calibration",
                "test_the_search_as_healed_fits_on_the_windows_that_it_does_not_score_on",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/scores.py",
        "tests/jobs/test_jobs.py",
        (
            (
                "self.method in AS_SETS and n",
                "not self.method and n",
                "test_what_evolution_chose_is_a_set_for_its_number_alone",
            ),
        ),
    ),
)

EVIDENCE = (
    Section(
        "short_gpt/jobs/calibration_rankings.py",
        "tests/jobs/test_calibration.py",
        (
            (
                "order[:, column] + step] = True",
                "order[:, column]] = True",
                "test_a_block_is_chosen_by_its_start",
            ),
            ("[which::2]", "[which:]", "test_rankings_agree_as_far_as_their_means_do"),
            (
                "2 * value - float(low)",
                "float(high)",
                "test_an_interval_is_not_below_what_noise_takes_away",
            ),
            (
                "if None in self.texts or len(known) < 2:",
                "if True:",
                "test_documents_are_drawn_whole_where_there_are_several",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/calibrating.py",
        "tests/jobs/test_calibration.py",
        (
            (
                "difference(own, parts)",
                "difference(whole, parts)",
                "test_a_cell_is_the_model_without_the_choice_of_one_text_judged_on_another",
            ),
            ("check_disjoint(ranking, judged)", "pass", "test_mistakes_are_told"),
            (
                "turns[:count]",
                "turns",
                "test_the_mix_is_refitted_on_windows_of_all_texts_in_turn",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/calibration.py",
        "tests/cli/test_cli_calibrate.py",
        (
            (
                "without_overlap(_cut(short, other, cut, limit), taken)",
                "without_overlap(_cut(short, other, cut, limit), [])",
                "test_in_one_text_what_ranks_is_left_out_of_what_judges",
            ),
        ),
    ),
    Section(
        "short_gpt/evaluation/documents.py",
        "tests/evaluation/test_documents.py",
        (
            (
                "(count - 1) / count)",
                "count / count)",
                "test_the_change_is_paired_over_the_documents",
            ),
            (
                "2 * tail / 2**count",
                "tail / 2**count",
                "test_the_change_is_paired_over_the_documents",
            ),
            (
                'int(str(r["doc_id"]))',
                'str(r["doc_id"])',
                "test_documents_are_in_order_and_numbers_alone",
            ),
        ),
    ),
    Section(
        "short_gpt/evaluation/completions.py",
        "tests/evaluation/test_completions.py",
        (
            (
                "(len(grams) - len({*grams}))",
                "len({*grams})",
                "test_repetition_is_the_share_of_n_grams_that_stood_there_before",
            ),
            (
                "len(front) - 1 : -1",
                "len(front) :",
                "test_the_loss_of_an_answer_is_that_of_its_tokens_alone",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/comparison_lora.py",
        "tests/jobs/test_comparison_lora.py",
        (
            (
                "distillation=self._distillation()",
                "distillation=None",
                "test_distillation_learns_what_the_whole_model_predicts",
            ),
            (
                "self.fitted_on, work_dir=refit_dir,",
                "self.fitted_on,",
                "test_a_refit_is_not_done_again_where_training_was_interrupted",
            ),
            (
                'joined(super().identity(), {"refitted on": read})',
                "super().identity()",
                "test_distillation_starts_from_the_refit",
            ),
            (
                "refit.heal(short, sorted(layers),",
                "refit.heal(short, layers,",
                "test_a_refit_is_not_done_again_where_training_was_interrupted",
            ),
            (
                "if self.fitted_on is None:",
                "if True:",
                "test_distillation_starts_from_the_refit",
            ),
            (
                "without_overlap(every, self._read_before())",
                "without_overlap(every, [])",
                "test_validation_windows_are_of_text_that_nothing_was_fitted_on",
            ),
            (
                "for folder in (work_dir, _refit_folder(work_dir)):",
                "for folder in (work_dir,):",
                "test_a_refit_is_not_done_again_where_training_was_interrupted",
            ),
        ),
    ),
    Section(
        "short_gpt/jobs/comparison.py",
        "tests/cli/test_cli_compare.py",
        (
            (
                "teacher=short, fitted_on=fitted_on",
                "teacher=short",
                "test_distillation_in_a_comparison_starts_from_the_refit_beside_it",
            ),
        ),
    ),
    Section(
        "short_gpt/selection/trials.py",
        "tests/selection/test_greedy.py",
        (
            (
                "show=show, done=tried",
                "show=show",
                "test_the_bar_of_a_continued_search_counts_what_was_tried_before",
            ),
        ),
    ),
)

SECTIONS = (
    *SCORING,
    *STOPPING,
    *SELECTION,
    *SURGERY,
    *HEALING,
    *EVALUATION,
    *EVIDENCE,
    *CHECKPOINTS,
    *GGUF_FILES,
    *STREAMING,
    *PROOFS,
    *RANKS,
    *CHOICE,
)
