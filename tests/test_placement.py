"""Expert placement: optimal where every plan can be tried, never worse than greedy packing, stable, and its numbers."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

pytest.importorskip("pyroute.placement", reason="needs the compiled extension", exc_type=ImportError)
from pyroute.placement import LoadAverage, Placement, load_metrics, place_experts


def largest(plan, loads):
    return plan.device_loads(loads).max(axis=-1)


def greedy_replicas(load, num_slots):
    """One slot each, then every further one to the largest load per replica."""
    count = np.ones(len(load), int)
    for _ in range(num_slots - len(load)):
        count[np.argmax(load / count)] += 1
    return count


def greedy_packing(shares, devices):
    """Falling shares to the least loaded device with a slot free: its largest load."""
    room, load, used = len(shares) // devices, np.zeros(devices), np.zeros(devices, int)
    for share in sorted(shares, reverse=True):
        device = min((d for d in range(devices) if used[d] < room), key=lambda d: load[d])
        load[device] += share
        used[device] += 1
    return load.max()


def greedy(load, devices, slots):
    count = greedy_replicas(load, slots)
    return greedy_packing(np.repeat(load / count, count), devices)


def best_of_all(load, devices, slots):
    """The smallest largest load of every choice of replicas and every packing."""
    best, E = np.inf, len(load)
    for more in itertools.combinations_with_replacement(range(E), slots - E):
        count = 1 + np.bincount(more, minlength=E)
        shares = np.repeat(load / count, count)
        best = min(best, _best_packing(tuple(sorted(shares, reverse=True)), devices, slots // devices))
    return best


def _best_packing(shares, devices, room):
    best = np.inf

    def place(i, loads, used):
        nonlocal best
        if i == len(shares):
            best = min(best, max(loads))
            return
        for d in range(devices):
            if used[d] < room and loads[d] + shares[i] < best:
                after = (*loads[:d], loads[d] + shares[i], *loads[d + 1 :])
                place(i + 1, after, (*used[:d], used[d] + 1, *used[d + 1 :]))

    place(0, (0.0,) * devices, (0,) * devices)
    return best


@pytest.mark.parametrize(
    ("experts", "devices", "slots"), [(3, 2, 4), (4, 2, 6), (4, 3, 6), (4, 4, 8), (5, 2, 8), (6, 3, 9), (7, 2, 8)]
)
@pytest.mark.parametrize("kind", ["gamma", "zipf", "ties", "one"])
def test_small_cases_are_optimal(rng, experts, devices, slots, kind):
    for _ in range(4):
        load = {
            "gamma": lambda: rng.gamma(1.0, 100.0, experts), "zipf": lambda: 1e4 / np.arange(1, experts + 1) ** 2,
            "ties": lambda: rng.integers(0, 3, experts).astype(float), "one": lambda: np.eye(experts)[0] * 7,
        }[kind]()  # fmt: skip
        plan = place_experts(load, devices, num_slots=slots)
        assert largest(plan, load)[0] == pytest.approx(best_of_all(load, devices, slots), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("experts", "devices", "slots"), [(64, 8, 72), (256, 32, 320), (256, 64, 256), (7, 3, 12), (60, 4, 64)]
)
def test_never_worse_than_greedy_packing(rng, experts, devices, slots):
    loads = np.concatenate([rng.gamma(0.5, 100.0, (6, experts)), rng.zipf(1.4, (6, experts)).clip(0, 10**6)]).astype(
        float
    )
    plan = place_experts(loads, devices, num_slots=slots)
    found = largest(plan, loads)
    assert all(f <= greedy(load, devices, slots) * (1 + 1e-9) for f, load in zip(found, loads, strict=True))
    assert (found >= loads.sum(axis=1) / devices * (1 - 1e-9)).all()


def test_replicas_make_the_largest_share_as_small_as_it_can_be(rng):
    load = rng.gamma(1.0, 100.0, 6)
    plan = place_experts(np.tile(load, (1, 1)), 12, num_slots=12)  # one slot a device: packing has no say
    least = min(
        max(load / (1 + np.bincount(more, minlength=6)))
        for more in itertools.combinations_with_replacement(range(6), 6)
    )
    assert largest(plan, load)[0] == pytest.approx(least)


@pytest.mark.parametrize(("nodes", "groups"), [(2, 4), (2, 8), (4, 8)])
def test_nodes_hold_whole_groups(rng, nodes, groups):
    loads = rng.gamma(1.0, 100.0, (5, 64))
    plan = place_experts(loads, 16, num_slots=80, num_nodes=nodes, num_groups=groups)
    node_of = np.arange(80) // (80 // nodes)
    for slots in plan.slot_to_expert:
        for group in range(groups):
            assert len(set(node_of[slots // (64 // groups) == group])) == 1
    assert (plan.replicas >= 1).all()
    assert (plan.replicas.sum(axis=1) == 80).all()


def test_every_slot_is_counted_where_it_is(rng):
    plan = place_experts(rng.gamma(1.0, 100.0, (3, 10)), 4, num_slots=16)
    for layer, slots in enumerate(plan.slot_to_expert):
        for expert in range(10):
            places = plan.expert_to_slots[layer, expert]
            assert places[places >= 0].tolist() == np.flatnonzero(slots == expert).tolist()
            assert plan.replicas[layer, expert] == (places >= 0).sum()


def test_balance_by_hand():
    plan = Placement(np.array([[0, 1, 0, 2]], np.int32), 2, 3)
    assert plan.device_loads([8, 1, 3]).tolist() == [[5, 7]]
    assert plan.balance([8, 1, 3]) == pytest.approx(6 / 7)
    assert plan.balance([0, 0, 0]) == 1


def test_the_same_loads_keep_every_slot(rng):
    loads = rng.gamma(1.0, 100.0, (4, 64))
    before = place_experts(loads, 8, num_slots=80)
    shuffled = Placement(before.slot_to_expert.reshape(4, 8, 10)[:, ::-1].reshape(4, 80), 8, 64)
    assert (place_experts(loads, 8, num_slots=80, previous=before).moves_from(before) == 0).all()
    assert (place_experts(loads, 8, num_slots=80, previous=shuffled).moves_from(shuffled) == 0).all()


def test_names_of_devices_cost_no_balance_and_save_moves(rng):
    loads = rng.gamma(1.0, 100.0, (6, 64))
    before = place_experts(loads, 8, num_slots=80)
    later = loads * rng.uniform(0.9, 1.1, loads.shape)
    fresh, kept = (place_experts(later, 8, num_slots=80, previous=p) for p in (None, before))
    assert np.allclose(largest(fresh, later), largest(kept, later))
    assert kept.moves_from(before).sum() < fresh.moves_from(before).sum()


@pytest.mark.parametrize("budget", [0, 1, 2, 5, 40])
def test_moves_stay_within_the_budget_and_only_help(rng, budget):
    loads = rng.gamma(1.0, 100.0, (6, 64))
    before = place_experts(loads, 8, num_slots=80)
    later = loads * rng.uniform(0.5, 1.5, loads.shape)
    after = place_experts(later, 8, num_slots=80, previous=before, max_moves=budget)
    assert (after.moves_from(before) <= budget).all()
    assert (largest(after, later) <= largest(before, later) * (1 + 1e-12)).all()
    assert (after.replicas >= 1).all()
    if budget >= 5:
        assert after.balance(later).mean() > before.balance(later).mean()


def test_one_move_takes_the_best_of_all_single_changes(rng):
    load = rng.gamma(1.0, 100.0, 6)
    before = Placement(np.array([[0, 1, 2, 3, 4, 5, 0, 1]], np.int32), 4, 6)
    after = place_experts(load, 4, num_slots=8, previous=before, max_moves=1)
    heavy = int(before.device_loads(load).argmax())
    best = largest(before, load)[0]
    for slot, expert in itertools.product(range(8), before.slot_to_expert[0, 2 * heavy : 2 * heavy + 2]):
        slots = before.slot_to_expert.copy()
        slots[0, slot] = expert
        if len(set(slots[0])) == 6 and expert not in before.slot_to_expert[0, slot // 2 * 2 : slot // 2 * 2 + 2]:
            best = min(best, largest(Placement(slots, 4, 6), load)[0])
    assert largest(after, load)[0] == pytest.approx(best)


def test_layers_do_not_see_each_other(rng):
    loads = rng.gamma(1.0, 100.0, (5, 32))
    together = place_experts(loads, 8, num_slots=40).slot_to_expert
    alone = [place_experts(load, 8, num_slots=40).slot_to_expert[0] for load in loads]
    assert np.array_equal(together, np.stack(alone))


def test_shapes_at_the_edges():
    assert place_experts([5.0], 1).slot_to_expert.tolist() == [[0]]
    assert place_experts([5.0], 3, num_slots=3).slot_to_expert.tolist() == [[0, 0, 0]]
    assert place_experts(np.zeros((2, 4)), 2).replicas.tolist() == [[1] * 4] * 2
    assert place_experts(np.zeros((0, 4)), 2).slot_to_expert.shape == (0, 4)
    assert place_experts(np.arange(7), 3).num_slots == 9
    assert place_experts(np.full(4, 1e300), 2).balance(np.full(4, 1e300)) == 1
    assert place_experts(np.array([1, 2, 3, 4], np.int32), 2).balance([1, 2, 3, 4]) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"loads": [1.0, -1.0]}, "loads must be finite and not negative, got -1.0"),
        ({"loads": [1.0, np.nan]}, "loads must be finite and not negative, got nan"),
        ({"loads": [1e308, 1e308, 0.0]}, r"loads must be of a finite sum, got values up to 1e\+308"),
        ({"loads": np.zeros((2, 2, 2))}, r"loads must be of shape \[E\] or \[L, E\]"),
        ({"loads": "heavy"}, "loads must be"),
        ({"num_devices": 0}, r"num_devices must be in 1\.\."),
        ({"num_devices": 2.0}, "num_devices must be an integer"),
        ({"num_slots": 3}, r"num_slots must be in 4\.\."),
        ({"num_slots": 5}, r"num_slots must be a multiple of num_devices \(2\)"),
        ({"num_slots": 10}, r"num_slots must be in 4\.\.E \* D \(8\)"),
        ({"num_nodes": 2}, "num_nodes must be a divisor of num_groups"),
        ({"max_moves": 3}, "previous must be a Placement with max_moves, got None"),
        ({"previous": "old"}, "previous must be a Placement"),
        ({"previous": Placement(np.arange(4)[None], 4, 4)}, "previous must be of 1 layers, 4 slots, 2 devices"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence):
    given = {"loads": [1.0, 2.0, 3.0, 4.0], "num_devices": 2, **arguments}
    with pytest.raises((TypeError, ValueError), match="place_experts: " + sentence) as caught:
        place_experts(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("slots", "devices", "experts"),
    [
        ([[0, 1, 2]], 2, 3),
        ([[0, 1, 3, 0]], 2, 3),
        ([[0, 1, 1, 0]], 2, 3),
        ([[0.0, 1.0]], 2, 2),
        ([0, 1], 2, 2),
        ([[0, -1]], 2, 1),
    ],
)  # fmt: skip
def test_a_plan_made_by_hand_is_read_in_full(slots, devices, experts):
    with pytest.raises((TypeError, ValueError), match="Placement: slot_to_expert must be"):
        Placement(np.array(slots), devices, experts)


def test_an_expert_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"^Placement: slot_to_expert must be in 0\.\.1, got -1$"):
        Placement(np.array([[1, 0, -1, 1]]), 2, 2)


def test_moves_are_from_a_plan():
    with pytest.raises(TypeError, match=r"^Placement\.moves_from: previous must be a Placement, got list$"):
        Placement(np.array([[0, 1]]), 2, 2).moves_from([[0, 1]])


# ---- loads ---------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    even, one, half = load_metrics([5, 5, 5, 5]), load_metrics([8, 0, 0, 0]), load_metrics([4, 4, 0, 0])
    assert even == (0, 0, pytest.approx(1), 0)
    assert one == (3, pytest.approx(np.sqrt(3)), pytest.approx(0), 3)
    assert half == (1, 1, pytest.approx(0.5), 2)
    assert load_metrics([0, 0]) == (0, 0, 0, 2)
    assert load_metrics([3]) == (0, 0, 1, 0)
    several = load_metrics(np.array([[5, 5], [8, 0]], np.int32))
    assert several.max_violation.tolist() == [0, 1]
    assert several.unused.tolist() == [0, 1]


def test_an_average_is_unbiased_from_the_start():
    average = LoadAverage(0.9)
    with pytest.raises(RuntimeError, match="nothing to average"):
        _ = average.average
    assert average.update([4, 8]).tolist() == [4, 8]
    assert average.update([4, 8]) == pytest.approx([4, 8])
    assert LoadAverage(0).update([1, 2]).tolist() == [1, 2]
    weights = np.array([0.1 * 0.9, 0.1]) / 0.19
    other = LoadAverage(0.9)
    other.update([10, 0])
    assert other.update([0, 10]) == pytest.approx(weights * 10)


@pytest.mark.parametrize("decay", [1, -0.1, "much", np.nan])
def test_a_decay_that_is_none(decay):
    with pytest.raises((TypeError, ValueError), match="LoadAverage: decay must be"):
        LoadAverage(decay)


def test_an_average_of_other_shapes():
    average = LoadAverage()
    average.update([1, 2])
    with pytest.raises(ValueError, match=r"loads must be of shape \[2\] as before"):
        average.update([1, 2, 3])


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys, monkeypatch):
    pytest.importorskip("rich")
    from pyroute.__main__ import main

    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        try:
            status = main(["placement", *map(str, arguments)])
        except SystemExit as error:
            status = error.code
        return status, capsys.readouterr()

    return run


def test_the_command_plans_a_trace(command, rng, tmp_path):
    trace = tmp_path / "trace.npy"
    np.save(trace, rng.poisson(rng.gamma(1.0, 100.0, (3, 16)), (10, 3, 16)))
    status, printed = command(trace, "--devices", 4, "--slots", 20)
    assert status == 0
    assert max(map(len, printed.out.splitlines())) <= 80
    assert "3 layers, 16 experts, 20 slots, 4 devices" in printed.out
    status, printed = command(trace, "--devices", 4, "--slots", 20, "--json")
    report = json.loads(printed.out)
    plan = Placement(np.array(report["slot_to_expert"]), 4, 16)
    mean = np.load(trace).mean(axis=0)
    assert report["balance"] == pytest.approx(plan.balance(mean).tolist())
    assert min(report["balance"]) > max(report["unplaced_balance"])
    assert (np.array(report["balance_of_worst_step"]) <= report["balance"]).all()


def test_a_list_of_loads_is_a_trace(command, tmp_path):
    trace = tmp_path / "trace.json"
    trace.write_text("[3, 1, 2, 2]")
    status, printed = command(trace, "--devices", 2)
    assert status == 0
    assert "1 layers, 4 experts, 4 slots, 2 devices" in printed.out


@pytest.mark.parametrize(
    ("content", "arguments", "sentence"),
    [
        (None, (), "cannot read"),
        ("no numbers", (), "holds no array of numbers"),
        ("[[1, 2], [3]]", (), "holds no array of numbers"),
        ("[" * 100_000, (), "holds no array of numbers"),
        ("[]", (), "must hold tokens per expert"),
        ("[[[1e308, 1e308]], [[0, 0]], [[0, 0]]]", (), "of a finite sum"),
        ("[1, -2]", (), "finite numbers that are not negative"),
        ("[1, 2, 3]", ("--slots", "5"), "num_slots must be a multiple of num_devices (2), got 5"),
        ("[1, 2, 3]", ("--nodes", "2"), "num_nodes must be a divisor"),
    ],
)
def test_a_trace_that_is_none_is_one_sentence(command, tmp_path, content, arguments, sentence):
    trace = tmp_path / "trace.json"
    if content is not None:
        trace.write_text(content)
    status, printed = command(trace, "--devices", 2, *arguments)
    assert status == 2
    assert printed.err.count("\n") == 1
    assert sentence in printed.err


def test_an_empty_array_file_is_no_trace(command, tmp_path):
    (tmp_path / "trace.npy").write_bytes(b"")
    status, printed = command(tmp_path / "trace.npy", "--devices", 1)
    assert status == 2
    assert "holds no array of numbers" in printed.err


def test_a_drawn_trace_on_a_cluster(command):
    sizes = ("zipf:0.7", "--devices", 64, "--slots", 320, "--nodes", 8, "--groups", 8, "--cluster", "h800")
    status, printed = command(*sizes, "--total", 2048)
    assert status == 0
    assert max(map(len, printed.out.splitlines())) <= 80
    for words in ("58 layers, 256 experts", "One layer of deepseek-v3", "2048 devices, 16 stages", "DeepEP's README"):
        assert words in printed.out
    status, printed = command(*sizes, "--total", 2048, "--json")
    found = json.loads(printed.out)["scaling"]
    even, before, after = (step["seconds"] for step in found["steps"])
    assert even == pytest.approx(19.9, rel=0.01)
    assert even < after < 0.6 * before
    names = [layer["name"] for layer in found["layers"]]
    assert names == ["even load, in order", "experts in order", "this plan"]
    assert found["layers"][0]["binds"] == "network"
    assert found["layers"][0]["messages"] == 14


@pytest.mark.parametrize("kind", ["svg", "html"])
def test_the_heat_map_as_a_file(command, rng, tmp_path, kind):
    from xml.etree import ElementTree

    trace, file = tmp_path / "trace.npy", tmp_path / f"map.{kind}"
    loads = np.ones((3, 8))
    loads[1, 0] = 100  # the device that holds it has 102 of 107, four times the mean and more
    np.save(trace, loads)
    status, _ = command(trace, "--devices", 4, "--plot", file)
    assert status == 0
    text = file.read_text()
    assert text.startswith("<svg" if kind == "svg" else "<!doctype html>")
    picture = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    assert "experts in order: up to 3.78 of the mean" in picture.get("aria-label")  # 101 of 107, times four devices
    cells = [path.get("d").count("M") for path in picture.iter() if path.tag.endswith("path")]
    assert sum(cells) == 2 * 3 * 4
    reds = [path for path in picture.iter() if path.get("fill") == "#b2182b" and path.tag.endswith("path")]
    assert [path.get("d").count("M") for path in reds] == [1, 1]  # before and after: nothing is to be won there
    assert ("http://" in text.replace("http://www.w3.org/2000/svg", "")) is False


def test_colours_of_the_heat_map():
    from pyroute.bench import placement_report

    report = {
        "mean_loads": [[4.0, 1.0, 1.0, 0.0]],
        "devices": 4,
        "experts": 4,
        "layers": 1,
        "slot_to_expert": [[0, 1, 2, 3]],
    }
    (line,) = placement_report.heat_map(report, 40)
    assert line.split()[1] == "[bold"  # 4 of a mean of 1.5
    assert "[blue]▄[/]" in line or "[blue]▃[/]" in line
    assert line.count("red") == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("zipf:much", "--devices", 4), "zipf:much must end in a number that is not negative"),
        (("zipf:-1", "--devices", 4), "zipf:-1 must end in a number that is not negative"),
        (("zipf:1", "--devices", 8, "--cluster", "laptop"), "--cluster must be one of h800, got laptop"),
        (("zipf:1", "--devices", 8, "--cluster", "h800", "--model", "gpt"), "--model must be one of deepseek-v3"),
        (("zipf:1", "--devices", 7, "--cluster", "h800"), "--devices must divide the 256 experts, got 7"),
        (("zipf:1", "--devices", 8, "--cluster", "h800", "--total", 100), "devices must be a multiple of stages (16)"),
        (("zipf:1", "--devices", 8, "--plot", "/nowhere/map.svg"), "--plot: cannot write /nowhere/map.svg"),
    ],
)
def test_a_cluster_that_is_none_is_one_sentence(command, arguments, sentence):
    status, printed = command(*arguments)
    assert status == 2
    assert printed.err.count("\n") == 1
    assert sentence in printed.err


def test_a_trace_of_another_model(command, tmp_path):
    trace = tmp_path / "trace.json"
    trace.write_text("[3, 1, 2, 2]")
    status, printed = command(trace, "--devices", 2, "--cluster", "h800")
    assert status == 2
    assert "deepseek-v3 has 256 experts, the trace 4" in printed.err
