"""A table proves itself: it cannot change and refuses coefficients off the path; every sampler makes good ones."""

import copy
import functools
import io
import itertools
import pickle
import weakref

import numpy as np
import pytest
import torch

import epskernels
from epskernels import Table, samplers, scaling, schedule, solvers
from epskernels.table import COLUMNS, VALUES

VP, ZERO_SNR = schedule.linear(), schedule.cosine().zero_terminal_snr()
KARRAS, FLOW = schedule.KarrasSchedule(), schedule.FlowSchedule(3.0)
KARRAS_ON_VP = schedule.KarrasSchedule(model=VP)
MAKE = {
    "ddpm": lambda: samplers.ddpm(VP, 8, scaling=1.017),
    "ddpm_learned": lambda: samplers.ddpm(VP, 8, scaling=1.005, variance="learned_range"),
    "ddim": lambda: samplers.ddim(VP, 8, scaling=1.0012, eta=0.5),
    "ddim_unscaled": lambda: samplers.ddim(VP, 8, scaling=1.0012, eta=0.5, direction="unscaled", clip=1.0),
    "edm_heun": lambda: samplers.edm_heun(KARRAS, 5, scaling=0.9985, S_churn=20, S_noise=1.003),
    "edm_euler": lambda: samplers.edm_euler(KARRAS_ON_VP, 5, prediction="v_prediction", S_churn=5, S_max=50),
    "dpmpp_2m": lambda: samplers.dpmpp_2m(VP, 8, scaling=1.003, guidance=2.0),
    "flow": lambda: samplers.ddim(FLOW, 8, prediction="flow"),
    "plms": lambda: samplers.plms(VP, 8, scaling=1.017),
    "sa_solver": lambda: samplers.sa_solver(VP, 8, scaling=1.003),
    "dpmpp_sde": lambda: samplers.dpmpp_sde(KARRAS, 5, scaling=1.003),
}


@functools.cache
def made(name):
    return MAKE[name]()


@pytest.fixture(params=MAKE)
def table(request):
    return made(request.param)


def values(table):
    """What the constructor was given, ready to be changed."""
    return {key: table[key].copy() for key in VALUES}


def test_every_sampler_names_itself_where_an_argument_is_unknown():
    for name, sampler in samplers.SAMPLERS.items():
        with pytest.raises(TypeError, match=f"^{name}: expected arguments among scaling, .*, got 'clp'$"):
            sampler(VP, 5, clp=1.0)
        assert sampler.__doc__.endswith(".") and sampler.__wrapped__.__doc__ == sampler.__doc__


# ---- immutable ----


@pytest.mark.parametrize("name", ["rows", "index", "parts", "discrete", "name", "device", "history", "_values", "new"])
def test_attributes_cannot_be_set_or_deleted(name):
    table = made("ddpm")
    with pytest.raises(AttributeError):
        setattr(table, name, None)
    with pytest.raises(AttributeError):
        delattr(table, name)
    assert not hasattr(table, "__dict__")


@pytest.mark.parametrize("column", VALUES)
def test_arrays_are_read_only(column):
    with pytest.raises(ValueError, match="read-only"):
        made("ddpm")[column][0] = 1.0


def test_arrays_given_are_copied():
    given = values(made("ddpm"))
    table = Table(given)
    before = table.rows.clone(), table["t"].copy()
    for array in given.values():
        array += 1
    assert torch.equal(table.rows, before[0]) and (table["t"] == before[1]).all()


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda table: pickle.loads(pickle.dumps(table)), lambda table: saved(table)],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_the_same_table(table, duplicate):
    assert_same_table(duplicate(table), table)


def saved(table):
    file = io.BytesIO()
    torch.save(table, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_table_can_be_referred_to_weakly():
    table = MAKE["ddpm"]()
    reference, cache = weakref.ref(table), weakref.WeakKeyDictionary({table: 1})
    assert reference() is table and cache[table] == 1
    del table
    assert reference() is None and not cache


def assert_same_table(a, b):
    assert torch.equal(a.rows, b.rows) and a.parts == b.parts and a.discrete == b.discrete
    for key in VALUES:
        assert (a[key] == b[key]).all(), key


# ---- the two equations ----


def test_a_table_made_again_from_its_columns_is_the_same(table):
    assert_same_table(Table(values(table), parts=table.parts, discrete=table.discrete), table)


@pytest.mark.parametrize("factor", [1.0001, 0.9999, 1.5, 0.0])
@pytest.mark.parametrize(
    "name, row, column, breaks",
    [
        ("ddpm", 0, "c_x", "mean"), ("ddpm", 4, "c_m0", "mean"), ("ddpm", 7, "c_m0", "mean"),
        ("ddpm", 0, "c_noise", "variance"), ("ddpm", 4, "c_noise", "variance"), ("ddpm", 4, "alpha_out", "mean"),
        ("ddpm_learned", 4, "c_noise", "variance"), ("ddpm_learned", 4, "logvar_min", "variance"),
        ("ddim", 3, "c_x", "mean"), ("ddim", 3, "c_noise", "variance"), ("ddim", 3, "sigma_out", "variance"),
        ("ddim_unscaled", 3, "c_f", "variance"), ("ddim_unscaled", 3, "c_m0", "mean"),
        ("edm_heun", 0, "c_x", "mean"), ("edm_heun", 0, "c_m0", "mean"), ("edm_heun", 1, "c_x", "mean"),
        ("edm_heun", 1, "c_m0", "mean"), ("edm_heun", 1, "c_m1", "mean"), ("edm_heun", 3, "c_m1", "mean"),
        ("edm_heun", 1, "c_noise", "variance"), ("edm_heun", 1, "excess", "variance"),
        ("edm_euler", 2, "c_noise", "variance"), ("dpmpp_2m", 0, "c_x", "mean"), ("dpmpp_2m", 4, "c_m0", "mean"),
        ("dpmpp_2m", 4, "c_m1", "mean"), ("dpmpp_2m", 4, "sigma_in", "variance"), ("flow", 0, "c_x", "variance"),
        ("flow", 3, "c_x", "mean"), ("flow", 3, "c_m0", "mean"),
    ],
)  # fmt: skip
def test_a_perturbed_coefficient_is_refused(name, row, column, breaks, factor):
    """The error names the equation and the row."""
    changed = values(made(name))
    assert changed[column][row] != 0
    changed[column][row] *= factor
    with pytest.raises(ValueError, match=f"^{breaks} of row {row} of made: the coefficients give"):
        Table(changed, name="made")


@pytest.mark.parametrize("name, row, column", [("ddpm", 4, "c_x"), ("ddpm", 4, "c_m0"), ("edm_heun", 1, "c_m1")])
def test_a_flipped_sign_is_refused(name, row, column):
    changed = values(made(name))
    changed[column][row] *= -1
    with pytest.raises(ValueError, match=f"^mean of row {row}"):
        Table(changed)


@pytest.mark.parametrize("column", ["c_x", "c_m0", "c_m1", "c_noise"])
def test_an_added_term_is_refused_in_any_row(table, column):
    for row in range(len(table)):
        changed = values(table)
        changed[column][row] += 0.01
        with pytest.raises(ValueError, match=f"^(mean|variance) of row {row} "):
            Table(changed)


def test_what_m0_is_stays_the_same_within_a_sampler():
    table = made("plms")
    assert not table.keeps_x0 and made("ddim").keeps_x0 and table.history == 2
    changed = values(table)
    changed["m_eps"][3] = 0.5
    with pytest.raises(ValueError, match="^(variance|noise of y) of row 3 "):
        Table(changed)
    row = {"c_x": 1.0, "c_m0": 0.0, "alpha_in": 1, "alpha_out": 1, "m_x0": [1, 1, 0]}
    with pytest.raises(ValueError, match="^m_x0: expected the same in all rows of a sampler: .* got 0.0 in row 2"):
        Table(row)
    both = epskernels.concat([made("ddim"), table])
    assert not both.keeps_x0 and both["m_eps"].tolist() == [0] * 8 + [1] * 9


def test_a_delay_line():
    """Row i reads call j's estimate by the weight (i, j): through m0, m1, m2, and y for one that is older."""
    by_call = np.tril(np.random.default_rng(0).standard_normal((9, 9)))
    for i in range(9):
        by_call[i, : max(i - 2, 0)] = 0
    by_call[6, 2] = by_call[7, 2] = 0.7  # held over two rows
    by_call[8, 5] = -0.3
    columns = solvers.delay_line(by_call)
    estimates, y, out = np.random.default_rng(1).standard_normal(9), np.nan, []
    for i in range(9):
        terms = {f"c_m{age}": estimates[i - age] for age in range(3) if i >= age} | {"c_y": y}
        out.append(sum(columns[name][i] * value for name, value in terms.items() if columns[name][i]))
        y = sum(k * v for k, v in ((columns["k_m2"][i], estimates[i - 2]), (columns["k_y"][i], y)) if k)
    np.testing.assert_allclose(out, by_call @ estimates, rtol=1e-12)


def test_moving_weight_between_terms_of_the_mean_keeps_it():
    """What the equations cannot see: c_m0 and c_m1 split wrongly. Convergence tests are for that."""
    changed = values(made("dpmpp_2m"))
    changed["c_m0"] += 0.1
    changed["c_m1"] -= 0.1
    Table(changed)


def test_equations_by_hand():
    """x' = x/2 + m0/4 + z/2 at alpha 1, sigma 1: alpha' = 3/4, sigma'^2 = 1/4 + 1/4."""
    row = {"c_x": 0.5, "c_m0": 0.25, "c_noise": 0.5, "alpha_in": 1, "sigma_in": 1, "alpha_out": 0.75}
    Table(row | {"sigma_out": 0.5**0.5})
    Table(row | {"sigma_out": 0.6, "excess": 0.5 - 0.36})
    Table(row | {"sigma_out": 0.5**0.5, "c_m0": 0.0, "c_m1": 0.5, "c_m2": -0.25})
    Table(row | {"sigma_out": 1.25**0.5, "logvar_min": np.log(4)})
    Table(row | {"sigma_out": 0.5**0.5, "c_x": 0.0, "c_f": 0.5, "f_x0": 1, "f_eps": 1})
    with pytest.raises(ValueError, match="mean"):
        Table(row | {"sigma_out": 0.5**0.5, "alpha_out": 0.7501})
    with pytest.raises(ValueError, match="variance"):
        Table(row | {"sigma_out": 0.7072})


# ---- rows, parts, provenance ----


def test_rows_are_the_columns_rounded_once(table):
    assert table.rows.dtype == torch.float32 and table.rows.shape == (len(table), 24) == (len(table), len(COLUMNS))
    for i, column in enumerate(COLUMNS):
        assert table[column].dtype == np.float64 and table[column].shape == (len(table),)
        expected = table[column].astype(np.float32)
        assert (table.rows[:, i].numpy().view(np.int32) == expected.view(np.int32)).all(), column
    assert (table["draw"] == np.arange(len(table))).all()


def test_columns_left_out_take_their_defaults():
    table = Table({"c_x": [1.0, 1.0], "alpha_in": 1.0, "alpha_out": 1.0})
    defaults = {"clip": np.inf, "g": 1, "c_in": 1, "lambda_t": 1, "c_x": 1, "alpha_in": 1, "alpha_out": 1}
    defaults |= {"c_in_next": 1, "m_x0": 1, "w_next": 1, "ends_step": 1}
    for key in VALUES:
        assert table[key].tolist() == [defaults.get(key, 0)] * 2, key
    assert table.parts == (("table", 0, 2, 1.0),) and table.name == "table"
    assert table.initial_sigma == 1 and table.discrete is False


def test_a_correction_is_taken_off_before_the_proof():
    """w_next*x' + w_m0*m0 + w_x*x, of x' = 0.5*x + 0.5*m0 from sigma 1 to 0.5."""
    columns = {"alpha_in": 1.0, "sigma_in": 1.0, "alpha_out": 1.0, "sigma_out": 0.5, "d_x": 0.5}
    corrected = columns | {"c_x": 1.2 * 0.5 - 0.3, "c_m0": 1.2 * 0.5 + 0.1, "w_next": 1.2, "w_m0": 0.1, "w_x": -0.3}
    assert Table(corrected).corrected and not Table(columns | {"c_x": 0.5, "c_m0": 0.5}).corrected
    for key in ("w_next", "w_m0", "w_x"):
        with pytest.raises(ValueError, match="(mean|variance) of row 0 of table: the coefficients give"):
            Table({name: value for name, value in corrected.items() if name != key})


def test_no_coefficient_is_minus_zero():
    table = Table({"c_x": 1.0, "alpha_in": 1.0, "alpha_out": 1.0, "c_f": -0.0, "c_m1": -0.0})
    assert not np.signbit(table["c_f"]).any() and not table.rows.signbit().any()


def test_index_and_row_index_count_the_rows(table):
    assert torch.equal(table.index, torch.arange(len(table))) and table.index.dtype == torch.int64
    assert len(table.row_index) == len(table)
    assert all(i.dim() == 0 and int(i) == k and i.dtype == torch.int64 for k, i in enumerate(table.row_index))


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_index_may_be_a_numpy_integer(kind):
    x, f = (torch.linspace(-1, 1, 10).reshape(2, 5) + shift for shift in (0.0, 0.3))
    table = samplers.ddim(VP, 10)
    for rows in (table, table.rows):
        assert torch.equal(epskernels.step(x, f, rows, kind(4)), epskernels.step(x, f, rows, 4))
        assert torch.equal(epskernels.moments(f, f, rows, kind(4)), epskernels.moments(f, f, rows, 4))
    with pytest.raises(RuntimeError, match="index: expected .*, got 200"):
        epskernels.step(x, f, table, kind(200))


def test_provenance_is_the_path():
    grid = VP.grid(10)
    table = samplers.ddpm(VP, 10, scaling=scaling.linear(0.001, 1.0, origin="cleanest"))
    for key, expected in (
        ("t", grid.t), ("alpha_in", grid.alpha), ("sigma_in", grid.sigma), ("alpha_out", grid.alpha_next),
        ("sigma_out", grid.sigma_next), ("lambda_t", 1 + 0.001 * np.arange(9, -1, -1)), ("f_x0", 0), ("f_eps", 1),
    ):  # fmt: skip
        np.testing.assert_array_equal(table[key], np.broadcast_to(expected, 10), err_msg=key)
    heun = samplers.edm_heun(KARRAS, 4, scaling=1.01)
    sigma = KARRAS.grid(4).sigma
    twice = np.repeat(sigma, 2)
    np.testing.assert_array_equal(heun["sigma_in"], twice[1:])
    np.testing.assert_array_equal(heun["sigma_out"], [*twice[2:], 0])
    assert (heun["alpha_in"] == 1).all() and (heun["lambda_t"] == 1.01).all()


def test_unknown_column_lists_the_known():
    with pytest.raises(KeyError, match="c_z.*d_x.*excess"):
        made("ddpm")["c_z"]


def _with_second_state(**changed):
    """Two rows: the first keeps half of the mean in y, the second takes it back."""
    columns = {
        "c_x": [0.5, 0.25], "c_m0": [0.5, 0.25], "k_x": [0.25, 0], "k_m0": [0.25, 0], "c_y": [0, 1],
        "alpha_in": 1.0, "alpha_out": 1.0, "sigma_in": [1.0, 0.5], "sigma_out": [0.5, 0.375],
        "y_out_x0": [0.5, 0], "y_out_eps": [0.25, 0], "y_x0": [0, 0.5], "y_eps": [0, 0.25],
    }  # fmt: skip
    return columns | changed


def test_second_state():
    table = Table(_with_second_state())
    assert table.second_state and not made("ddpm").second_state and table.history == 0
    assert Table(_with_second_state(k_m0=[0, 0], k_m1=[0.25, 0])).history == 1
    assert Table(_with_second_state(k_m0=[0, 0], k_m2=[0.25, 0])).history == 2
    assert "c_y" in repr(table) and "k_x" in repr(table)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"c_y": [0, 0.9]}, "mean of row 1"),
        ({"k_m0": [0.3, 0]}, "mean of y of row 0"),
        ({"k_x": [0.3, 0], "k_m0": [0.2, 0]}, "noise of y of row 0"),
        ({"y_x0": [0, 0.4], "c_m0": [0.5, 0.35]}, "second state of row 1"),
        ({"y_eps": [0, 0.2], "sigma_out": [0.5, 0.325]}, "second state of row 1"),
        (
            {"c_y": [0.1, 1]},
            "c_y: expected 0 in a sampler's first row: no row before it has written y, got 0.1 in row 0",
        ),
        ({"k_y": [0.1, 0]}, "k_y: expected 0 in a sampler's first row"),
    ],
)
def test_a_second_state_that_does_not_fit_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        Table(_with_second_state(**changed))


def test_the_second_state_does_not_pass_from_one_sampler_to_the_next():
    one = Table(_with_second_state())
    assert len(epskernels.concat([one, one])) == 4


@pytest.mark.parametrize("name", ["guided_channels", "draw"])
@pytest.mark.parametrize("value", [-1, 0.5, 2**24])
def test_counts(name, value):
    with pytest.raises(ValueError, match=rf"{name}: expected an integer in \[0, 2\^24\), got"):
        Table({"c_x": 1.0, "alpha_in": 1, "alpha_out": 1, name: value})


def test_c_in_next_is_that_of_the_row_after(table):
    assert table["c_in_next"].tolist() == [*table["c_in"][1:], 1.0]


def test_c_in_next_of_a_concatenated_table():
    """Each sampler's last row hands over the state itself."""
    heun, euler = made("edm_heun"), made("edm_euler")
    both = epskernels.concat([heun, euler])
    assert both["c_in_next"].tolist() == [*heun["c_in"][1:], 1.0, *euler["c_in"][1:], 1.0]


def test_concat():
    a, b, c = made("ddpm"), made("ddim"), made("dpmpp_2m")
    both = epskernels.concat([a, b])
    table = epskernels.concat([both, c])
    assert len(table) == 24 and table.discrete
    assert table.parts == (("ddpm[8]", 0, 8, 1.0), ("ddim[8]", 8, 8, 1.0), ("dpmpp_2m[8]", 16, 8, 1.0))
    assert table.name == "ddpm[8] + ddim[8] + dpmpp_2m[8]"
    assert torch.equal(table.rows, torch.cat([a.rows, b.rows, c.rows]))
    for key in VALUES:
        np.testing.assert_array_equal(table[key], np.concatenate([a[key], b[key], c[key]]), err_msg=key)
    assert torch.equal(table.index, torch.arange(24)) and len(table.row_index) == 24
    assert_same_table(epskernels.concat([a]), a)
    assert_same_table(epskernels.concat(iter([a, b])), both)


def test_concat_keeps_each_initial_sigma():
    heun, euler = made("edm_heun"), samplers.edm_euler(schedule.KarrasSchedule(sigma_max=10.0), 3)
    table = epskernels.concat([euler, heun])
    assert [part[3] for part in table.parts] == [euler.initial_sigma, heun.initial_sigma]
    assert table.initial_sigma == euler.initial_sigma == pytest.approx(10)
    assert heun.initial_sigma > 80 and not table.discrete


def test_traits_of_a_concatenation_are_those_of_any_part():
    table = epskernels.concat([made("ddpm_learned"), samplers.dpmpp_2m(VP, 5, guidance=2.0)])
    assert table.guided and table.learned_variance and table.needs_noise and table.history == 1 and table.takes_grad


def test_to(table):
    assert table.to("cpu") is table and table.device == torch.device("cpu")
    moved = table.to("meta")
    assert moved.device == torch.device("meta") == moved.rows.device == moved.index.device == moved.row_index[0].device
    assert moved.parts == table.parts and moved.discrete == table.discrete and moved.rows.shape == table.rows.shape
    for key in VALUES:
        np.testing.assert_array_equal(moved[key], table[key])


def test_repr_shows_name_rows_and_coefficients(table):
    title, head, *lines = repr(table).splitlines()
    assert title.startswith(f"Table {table.name}, {len(table)} rows, cpu")
    assert ("guided" in title) == table.guided and ("learned variance" in title) == table.learned_variance
    shown = head.split()
    assert shown[:7] == ["row", "t", "lambda_t", "d_x", "d_f", "c_x", "c_m0"]
    for column in ("c_f", "c_m1", "c_m2", "c_noise", "c_grad"):
        assert (column in shown) == table[column].any()
    if len(table) <= 8:
        assert [int(line.split()[0]) for line in lines] == list(range(len(table)))
        first = dict(zip(shown, map(float, lines[0].split()), strict=True))
        assert all(first[key] == pytest.approx(table[key][0], rel=1e-5) for key in shown[1:])
    else:
        assert [line.split()[0] for line in lines] == ["0", "1", "2", "...", str(len(table) - 2), str(len(table) - 1)]


# ---- every sampler builds, whatever its options: the constructor checks the two equations ----

PREDICTIONS = samplers.PREDICTIONS
RISING = scaling.linear(0.002, 1.0, origin="cleanest")
SCALINGS = {"lambda_1": 1.0, "above_1": 1.017, "below_1": 0.9985, "rising": RISING}
each_scaling = pytest.mark.parametrize("scale", SCALINGS.values(), ids=list(SCALINGS))
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
each_clip_and_guidance = pytest.mark.parametrize(
    "clip, guidance", [(None, 1.0), (1.0, 7.5), (0.5, 0.0)], ids=["plain", "clip_guided", "clip_unconditional"]
)
PATHS = {
    "linear": lambda steps: (VP, steps),
    "scaled_linear": lambda steps: (schedule.scaled_linear(), steps),
    "cosine_trailing": lambda steps: (schedule.cosine(), steps, {"spacing": "trailing"}),
    "ends_at_first": lambda steps: (VP, steps, {"final": "first", "steps_offset": 1}),
    "adm_sections": lambda steps: (VP, f"{steps}"),
    # From a noise level below 1 on: at sigma = 1, alpha is 0.
    "flow": lambda steps: (_part(FLOW.grid(steps + 1), 1), steps),
}


def _part(grid, first):
    """A grid without its noisiest points."""
    return schedule.Grid(grid.t[first:], grid.alpha[first:], grid.sigma[first:], grid.c_in[first:], 1.0, discrete=False)


def build(sampler, path, steps, **options):
    chosen, steps, *rest = PATHS[path](steps)
    return sampler(chosen, steps, **options, **(rest[0] if rest else {}))


def check_traits(table, steps, *, guidance, history=0, noise=None, learned=False):
    assert len(table) == steps
    assert table.guided == (guidance != 1)
    assert table.learned_variance == learned
    assert table.history == history
    if noise is not None:
        assert table.needs_noise == noise
    assert table.rows.isfinite()[:, [i for i, column in enumerate(COLUMNS) if column != "clip"]].all()


@each_clip_and_guidance
@each_scaling
@each_prediction
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("path", PATHS)
def test_ddpm_builds(path, variance, prediction, scale, clip, guidance):
    for steps in (2, 3, 20):
        table = build(
            samplers.ddpm, path, steps,
            variance=variance, prediction=prediction, scaling=scale, clip=clip, guidance=guidance,
        )  # fmt: skip
        check_traits(table, steps, guidance=guidance, noise=True, learned=variance == "learned_range")
        assert table.takes_grad and table["c_noise"][-1] == 0
        assert (table["clip"] == (clip or np.inf)).all() and (table["g"] == guidance).all()


@each_clip_and_guidance
@each_scaling
@each_prediction
@pytest.mark.parametrize("direction", ["scaled", "unscaled"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("path", PATHS)
def test_ddim_builds(path, eta, direction, prediction, scale, clip, guidance):
    for steps in (1, 2, 20):
        table = build(
            samplers.ddim, path, steps,
            eta=eta, direction=direction, prediction=prediction, scaling=scale, clip=clip, guidance=guidance,
        )  # fmt: skip
        noisy = eta > 0 and bool((table["sigma_out"] > 0).any())
        check_traits(table, steps, guidance=guidance, noise=noisy)
        assert table["c_f"].any() == (direction == "unscaled" and bool((table["sigma_out"] > 0).any()))


@pytest.mark.parametrize("lower_order_final", [True, False], ids=["lower_order_final", "second_order_final"])
@each_scaling
@each_prediction
@pytest.mark.parametrize("path", [*PATHS, "karras", "karras_on_timesteps"])
def test_dpmpp_2m_builds(path, prediction, scale, lower_order_final):
    for steps in (1, 2, 3, 20):
        options = {"prediction": prediction, "scaling": scale, "lower_order_final": lower_order_final, "guidance": 3.0}
        if path in PATHS:
            table = build(samplers.dpmpp_2m, path, steps, **options)
        else:
            table = samplers.dpmpp_2m(KARRAS if path == "karras" else KARRAS_ON_VP, steps, **options)
        last = table["sigma_out"][-1] > 0 and not lower_order_final
        check_traits(table, steps, guidance=3.0, history=int(steps > 2 or (steps == 2 and last)), noise=False)
        assert table["c_m1"][0] == 0 and (table["c_m1"][-1] != 0) == (last and steps > 1)


CHURN = {
    "no_churn": {},
    "churn": {"S_churn": 20},
    "churn_within": {"S_churn": 40, "S_min": 0.05, "S_max": 50.0},
    "churn_noise": {"S_churn": 80, "S_max": 50.0, "S_noise": 1.003},
}


@pytest.mark.parametrize("churn", CHURN)
@each_scaling
@each_prediction
@pytest.mark.parametrize("network", ["denoiser", "timesteps"])
@pytest.mark.parametrize("sampler", [samplers.edm_euler, samplers.edm_heun], ids=["euler", "heun"])
def test_edm_builds(sampler, network, prediction, scale, churn):
    # Churn raises the first noise level, which a network of timesteps must have seen as well.
    path = KARRAS if network == "denoiser" else schedule.KarrasSchedule(sigma_max=50.0, model=VP)
    for steps in (1, 2, 18):
        table = sampler(path, steps, prediction=prediction, scaling=scale, guidance=1.5, clip=1.0, **CHURN[churn])
        heun = sampler is samplers.edm_heun and steps > 1
        inside = path.grid(steps).sigma[1:]
        settings = CHURN[churn]
        inside = inside[(inside >= settings.get("S_min", 0)) & (inside <= settings.get("S_max", np.inf))]
        noisy = bool(settings) and inside.size > 0
        check_traits(table, 2 * steps - 1 if heun else steps, guidance=1.5, history=int(heun), noise=noisy)
        assert not table.discrete and table["sigma_out"][-1] == 0


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
@pytest.mark.parametrize("sampler", [samplers.ddpm, samplers.ddim, samplers.dpmpp_2m], ids=lambda s: s.__name__)
def test_zero_terminal_snr_builds_without_scaling_there(sampler, prediction):
    table = sampler(ZERO_SNR, 10, spacing="trailing", prediction=prediction)
    assert table["alpha_in"][0] == 0 and table.rows[:, :2].isfinite().all()
    except_first = scaling.array([1.0, *[1.01] * 9], origin="noisiest")
    assert sampler(ZERO_SNR, 10, spacing="trailing", prediction=prediction, scaling=except_first)["lambda_t"][1] == 1.01
    with pytest.raises(ValueError, match=r"scaling: expected 1 where x is noise alone \(step 0\), got 1.01"):
        array = scaling.array([1.01] * 10, origin="cleanest")
        sampler(ZERO_SNR, 10, spacing="trailing", prediction=prediction, scaling=array)
    of_a_formula = sampler(ZERO_SNR, 10, spacing="trailing", prediction=prediction, scaling=1.01)
    assert of_a_formula["lambda_t"].tolist() == [1.0, *[1.01] * 9]
    assert torch.equal(of_a_formula.rows[0], table.rows[0]) and not torch.equal(of_a_formula.rows[1], table.rows[1])


@pytest.mark.parametrize("sampler", [samplers.ddpm, samplers.ddim, samplers.dpmpp_2m], ids=lambda s: s.__name__)
def test_flow_builds_from_pure_noise(sampler):
    table = sampler(FLOW, 10, prediction="flow")
    assert table["alpha_in"][0] == 0 and table["sigma_in"][0] == 1 and not table.discrete
    assert sampler(FLOW, 10, prediction="flow", scaling=1.01)["lambda_t"].tolist() == [1.0, *[1.01] * 9]


# name: a table whose first step begins at alpha below sigma/900 and above 0, and of a network that predicts eps.
ALMOST_NOISE = {
    "ddim": lambda s, p: samplers.ddim(schedule.cosine(), 10, spacing="trailing", prediction=p, scaling=s, clip=None),
    "ddpm": lambda s, p: samplers.ddpm(schedule.cosine(), 10, spacing="trailing", prediction=p, scaling=s, clip=None),
    "dpmpp_2m": lambda s, p: samplers.dpmpp_2m(schedule.cosine(), 10, spacing="trailing", prediction=p, scaling=s),
    "heun": lambda s, p: samplers.heun(schedule.cosine(), 10, spacing="trailing", prediction=p, scaling=s),
    "edm_heun": lambda s, p: samplers.edm_heun(schedule.KarrasSchedule(sigma_max=4096.0), 10, prediction=p, scaling=s),
}


@pytest.mark.parametrize("name", ALMOST_NOISE)
def test_lambda_where_x_is_almost_noise_alone(name, caplog):
    """x_0' = x_0 + (1 - 1/lambda)*(sigma/alpha)*eps would be noise; a network's own eps is divided as the paper has it."""
    scaling._say.cache_clear()
    make = ALMOST_NOISE[name]
    table = make(1.01, "sample" if name == "edm_heun" else "v_prediction")
    alone = table["sigma_in"] > 900 * table["alpha_in"]
    assert alone[0] and not alone[-1] and (table["alpha_in"] > 0).all()
    assert (table["lambda_t"][alone] == 1).all() and table["lambda_t"][-1] == 1.01
    assert caplog.text.count("lambda is 1 in step 0: x is noise alone there") == 1
    made = make(scaling.array([1.01] * 10, origin="noisiest"), "epsilon")  # not refused
    assert (made["lambda_t"] == 1.01).all()
    with pytest.raises(ValueError, match=r"scaling: expected 1 where x is noise alone \(step 0\), got 1.01"):
        make(scaling.array([1.01] * 10, origin="noisiest"), "sample")
    rows = table.scaled_rows(torch.tensor(1.2))
    assert torch.equal(rows[0], table.rows[0]) and not torch.equal(rows[-1], table.rows[-1])


@pytest.mark.parametrize("prediction, scale", list(itertools.product(PREDICTIONS, [1.0, 1.05, 0.95])))
def test_denoiser_inverts_the_network(prediction, scale):
    """m0 of the exact output is x_0 where lambda is 1; else x_0 + (1 - 1/lambda)*(sigma/alpha)*eps."""
    grid = VP.grid(10)
    x_0, eps = 0.3, -1.7
    d_x, d_f, f_x0, f_eps = samplers.denoiser(prediction, grid, np.full(10, scale))
    m0 = d_x * (grid.alpha * x_0 + grid.sigma * eps) + d_f * (f_x0 * x_0 + f_eps * eps)
    np.testing.assert_allclose(m0, x_0 + (1 - 1 / scale) * grid.sigma / grid.alpha * eps, rtol=1e-9)


@pytest.mark.parametrize(
    "prediction, f", [("epsilon", (0, 1)), ("sample", (1, 0)), ("v_prediction", (-0.6, 0.8)), ("flow", (-1, 1))]
)
def test_what_a_network_predicts(prediction, f):
    """(f_x0, f_eps) at alpha 0.8, sigma 0.6."""
    got = samplers.model_output(prediction, np.array([0.8]), np.array([0.6]))
    assert [part.item() for part in got] == list(f)


def test_classifier_guidance_is_left_out_where_alpha_is_0():
    """Elsewhere the shift is that of eps -> eps - sigma*grad, in x_0 and in the direction."""
    path = schedule.linear().zero_terminal_snr()
    table = samplers.ddim(path, 4, spacing="trailing", prediction="v_prediction")
    alpha, sigma = table["alpha_in"], table["sigma_in"]
    assert alpha[0] == 0 and table["c_grad"][0] == 0
    expected = table["alpha_out"] * sigma**2 / np.where(alpha == 0, 1, alpha) - table["sigma_out"] * sigma
    np.testing.assert_allclose(table["c_grad"][1:], expected[1:], rtol=1e-12)


def test_a_table_made_in_inference_mode_serves_calls_with_gradients():
    with torch.inference_mode():
        table = samplers.ddim(schedule.linear(), 4)
    x, f = torch.ones(1, 3, 4), torch.ones(1, 3, 4, requires_grad=True)
    epskernels.step(x, f, table, 1).sum().backward()
    assert f.grad.isfinite().all() and not table.index.is_inference()


def test_churn_acts_at_both_of_its_bounds():
    sigma = np.array([1.0, 2.0, 5.0, 6.0])
    raised = solvers.churned(sigma, 10, 1.0, 2.0, 5.0) > sigma
    assert raised.tolist() == [False, True, True, False]


def test_lcm_s_boundary_is_that_of_sigma_data():
    """arXiv 2310.04378, section 4.1: c_skip = sigma_data^2/((s*t)^2 + sigma_data^2)."""
    table = samplers.lcm(schedule.linear(), 4, sigma_data=2.0, timestep_scaling=0.01)
    c_skip = 4 / ((0.01 * table["t"]) ** 2 + 4)
    np.testing.assert_allclose(table["c_x"][:-1], table["alpha_in"][1:] * c_skip[:-1], rtol=1e-12)
