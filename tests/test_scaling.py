"""The model of expert parallelism past one machine: by hand, against drawn tokens, against published measurements."""

from __future__ import annotations

import dataclasses
from math import comb

import numpy as np
import pytest

pytest.importorskip("pyroute.placement", reason="needs the compiled extension", exc_type=ImportError)
from pyroute import RouterConfig
from pyroute.bench.model_sizes import MODELS
from pyroute.placement import Placement, place_experts
from pyroute.scaling import H800, Layer, Link, Training, layer_time, layer_traffic, step_time, zipf_trace

DEEPSEEK = MODELS["deepseek-v3"]
FREE = RouterConfig(256, 8, "sigmoid")
LIMITED = RouterConfig(256, 8, "sigmoid", num_groups=8, topk_groups=4, group_score="top2_sum")


def in_order(experts, devices, layers=1):
    return Placement(np.tile(np.arange(experts, dtype=np.int32), (layers, 1)), devices, experts)


def layer(config=FREE, tokens=4096, send="node", **sizes):
    return Layer(config, DEEPSEEK.shape.hidden, DEEPSEEK.shape.intermediate, tokens, send, **sizes)


def cluster(nodes, each=8):
    return dataclasses.replace(H800, nodes=nodes, devices_per_node=each)


def training(**change):
    other = 2.0 * (DEEPSEEK.active - DEEPSEEK.moe_layers * 8 * DEEPSEEK.expert) + DEEPSEEK.attention_flops(4096)
    return Training(**{"tokens": 15360 * 4096, "devices": 2048, "stages": 16, "other_flops": other, **change})


# ---- traffic -------------------------------------------------------------------------------------------------------


def test_by_hand():
    """Two nodes of two devices, an expert each, one for a token: a node is needed by half of the 100 tokens."""
    config = RouterConfig(4, 1)
    found = {
        send: layer_traffic(cluster(2, 2), Layer(config, 8, 8, 100, send), in_order(4, 4), np.ones(4))
        for send in ("node", "device", "expert")
    }
    for traffic in found.values():
        assert traffic.rows.tolist() == [100] * 4
        assert traffic.network_out == pytest.approx([50] * 4)
        assert traffic.network_in == pytest.approx([50] * 4)
        assert traffic.nodes_per_token == pytest.approx(0.5)
    # inside: a quarter of the own tokens go to the neighbour, and a quarter of those that come for this node
    assert found["node"].inside_out == pytest.approx([50] * 4)
    assert found["node"].inside_in == pytest.approx([50] * 4)
    assert found["device"].inside_out == pytest.approx([25] * 4)


def draw(config, loads, tokens, rng):
    """Ids [tokens, k] without replacement, shares as the loads; groups likewise by the best of each."""
    keys = np.log(loads) + rng.gumbel(size=(tokens, config.num_experts))
    if config.num_groups > 1:
        best = keys.reshape(tokens, config.num_groups, -1).max(axis=2)
        closed = best < np.sort(best, axis=1)[:, -config.topk_groups][:, None]
        keys = np.where(np.repeat(closed, config.num_experts // config.num_groups, axis=1), -np.inf, keys)
    return np.argsort(-keys, axis=1)[:, : config.top_k]


def walk(cluster, send, plan, ids, rng):
    """Copies through every port, one token after another."""
    D, G = cluster.devices, cluster.devices_per_node
    ports = {name: np.zeros(D) for name in ("network_out", "network_in", "inside_out", "inside_in")}
    slots = plan.expert_to_slots[0]

    def send_one(a, b):
        way = "inside" if a // G == b // G else "network"
        if a != b:
            ports[f"{way}_out"][a] += 1
            ports[f"{way}_in"][b] += 1

    for token, experts in enumerate(ids):
        source = token % D
        targets = [rng.choice(slots[e][slots[e] >= 0]) * D // plan.num_slots for e in experts]
        targets = targets if send == "expert" else sorted(set(targets))
        if send != "node":
            for target in targets:
                send_one(source, target)
            continue
        for node in sorted({target // G for target in targets}):
            through = node * G + source % G
            send_one(source, through)
            for target in targets:
                if target // G == node:
                    send_one(through, target)
    return ports


@pytest.mark.parametrize("send", ["node", "device", "expert"])
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("replicas", [0, 16])
def test_against_drawn_tokens(rng, send, groups, replicas):
    """4096 tokens of 32 devices, sums of all ports: sampling is below 1 %, independence of experts costs the rest."""
    config = RouterConfig(64, 6, num_groups=4, topk_groups=2) if groups else RouterConfig(64, 6)
    loads, machines = rng.gamma(8.0, 10.0, 64), cluster(4)
    ids = draw(config, loads, 4096, rng)
    counts = np.bincount(ids.reshape(-1), minlength=64)
    plan = place_experts(counts, 32, num_slots=64 + 2 * replicas, num_nodes=4, num_groups=4)
    found = layer_traffic(machines, Layer(config, 64, 64, 128, send), plan, counts)
    for name, copies in walk(machines, send, plan, ids, rng).items():
        assert getattr(found, name).sum() == pytest.approx(copies.sum(), rel=0.05), name
    assert found.rows.sum() == pytest.approx(4096 * 6)
    assert found.rows == pytest.approx(plan.device_loads(counts)[0])


@pytest.mark.parametrize("config", [FREE, LIMITED])
def test_what_goes_out_comes_in_and_nodes_save_copies(rng, config):
    loads = rng.gamma(1.0, 100.0, 256)
    plan = place_experts(loads, 64, num_slots=320, num_nodes=8, num_groups=8)
    network = []
    for send in ("node", "device", "expert"):
        found = layer_traffic(cluster(8), layer(config, send=send), plan, loads)
        assert found.network_out.sum() == pytest.approx(found.network_in.sum())
        assert found.inside_out.sum() == pytest.approx(found.inside_in.sum())
        network.append(found.network_out.sum())
    assert network[0] < network[1] < network[2]
    assert layer_traffic(cluster(8), layer(config), plan, loads).nodes_per_token <= (4 if config is LIMITED else 8)


def test_a_limited_router_reaches_at_most_its_groups_nodes():
    even = np.ones(256)
    free, limited = (layer_traffic(cluster(8), layer(c), in_order(256, 64), even) for c in (FREE, LIMITED))
    exact = 4 * (1 - comb(96, 8) / comb(128, 8)) * 7 / 8  # 8 of the 128 experts of four open groups
    assert limited.nodes_per_token == pytest.approx(exact, rel=0.04)
    exact = 8 * (1 - comb(224, 8) / comb(256, 8)) * 7 / 8
    assert free.nodes_per_token == pytest.approx(exact, rel=0.01)


def test_nothing_to_do():
    found = layer_traffic(cluster(2), layer(), in_order(256, 16), np.zeros(256))
    assert all((np.asarray(part) == 0).all() for part in found)
    one = layer_time(cluster(1, 1), layer(), in_order(256, 1), np.ones(256))
    assert one.dispatch == one.combine == one.network_bytes == one.messages == 0
    assert one.imbalance == 1


# ---- times ---------------------------------------------------------------------------------------------------------

# DeepEP's README, H800 with 160 GB/s NVLink and 50 GB/s InfiniBand. Normal kernels, 4096 tokens, top-8, four groups:
# bandwidth of the bottleneck by devices, dispatch and combine. Low-latency kernels, 128 tokens: seconds.
NORMAL = {8: (153e9, 158e9), 16: (43e9, 43e9), 32: (58e9, 57e9), 64: (51e9, 50e9)}
LOW_LATENCY = {
    8: (77e-6, 114e-6), 16: (118e-6, 195e-6), 32: (155e-6, 273e-6), 64: (173e-6, 314e-6), 128: (192e-6, 369e-6),
    256: (194e-6, 360e-6),
}  # fmt: skip


def published(devices):
    """Seconds behind the normal kernels' bandwidths, which count the copies of a token's own node or device too."""
    nodes = devices // 8
    places, group, open_to = (8, 32, 256) if nodes == 1 else (min(nodes, 4), 256 // nodes, 128 if nodes == 8 else 256)
    copies = 4096 * places * (1 - comb(open_to - group, 8) / comb(open_to, 8))
    return tuple(
        copies * 7168 * size / bandwidth for size, bandwidth in zip((1 + 4 / 128, 2), NORMAL[devices], strict=True)
    )


@pytest.mark.parametrize("devices", NORMAL)
def test_normal_kernels_as_published(devices):
    """The model takes the links' peaks, so it lies below, by a quarter at most."""
    nodes = devices // 8
    config = LIMITED if nodes == 8 else FREE
    found = layer_time(cluster(nodes), layer(config), in_order(256, devices), np.ones(256))
    for seconds, measured in zip((found.dispatch, found.combine), published(devices), strict=True):
        assert 0.75 * measured < seconds < 1.02 * measured
    assert found.binds == ("inside" if nodes <= 2 else "network")


@pytest.mark.parametrize("devices", LOW_LATENCY)
def test_low_latency_kernels_as_published(devices):
    """Latencies are fitted to the dispatch with 8 and 32 devices; all others are predictions."""
    experts = 256
    found = layer_time(cluster(devices // 8), layer(FREE, 128, "expert"), in_order(experts, devices), np.ones(experts))
    for seconds, measured in zip((found.dispatch, found.combine), LOW_LATENCY[devices], strict=True):
        assert seconds == pytest.approx(measured, rel=0.16)


def test_latency_binds_few_tokens_and_bandwidth_many():
    binds = [
        layer_time(cluster(8), layer(LIMITED, tokens), in_order(256, 64), np.ones(256)).binds
        for tokens in (1, 64, 1024, 8192)
    ]
    assert binds == ["latency", "latency", "network", "network"]


def test_the_busiest_device_sets_the_pace(rng):
    loads = np.ones(256)
    loads[0] = 100
    even, skewed = (layer_time(cluster(8), layer(), in_order(256, 64), x) for x in (np.ones(256), loads))
    assert even.imbalance == pytest.approx(1)
    assert skewed.imbalance == pytest.approx(64 * 103 / 355)
    assert skewed.experts == pytest.approx(even.experts * skewed.imbalance)
    plan = place_experts(loads, 64, num_slots=320)
    assert layer_time(cluster(8), layer(), plan, loads).imbalance < 1.2


# ---- steps ---------------------------------------------------------------------------------------------------------


def test_a_balanced_step_takes_what_the_published_hours_say():
    """15,360 sequences of 4096 tokens on 2048 devices at 14.8e12 tokens in 2.664e6 hours: 19.9 s. It fixes the rate."""
    loads = np.ones((58, 256))
    found = step_time(cluster(8), layer(LIMITED), training(), in_order(256, 64, 58), loads)
    assert found.seconds == pytest.approx(2.664e6 * 3600 / 14.8e12 * 15360 * 4096 / 2048, rel=0.01)
    assert found.micro_batches == pytest.approx(120)
    assert found.exposed == 0
    assert found.imbalance == pytest.approx(1)


def test_imbalance_costs_what_the_experts_share_says(rng):
    trace = zipf_trace(1, 58, 256, exponent=0.8)[0]
    plans = in_order(256, 64, 58), place_experts(trace, 64, num_slots=320, num_nodes=8, num_groups=8)
    even = step_time(cluster(8), layer(LIMITED), training(), plans[0], np.ones((58, 256)))
    before, after = (step_time(cluster(8), layer(LIMITED), training(), plan, trace) for plan in plans)
    assert even.seconds < after.seconds < before.seconds
    assert before.imbalance > 2 > after.imbalance
    alone = step_time(cluster(8), layer(LIMITED), training(overlap=False), plans[1], trace)
    assert alone.seconds > after.seconds + after.exchange * 0.9
    assert alone.exposed == pytest.approx(alone.exchange)


def test_stages_share_the_layers():
    loads = np.ones((8, 256))
    loads[5, 0] = 1000
    found = step_time(cluster(8), layer(), training(stages=4, devices=256), in_order(256, 64, 8), loads)
    assert found.stage == 2
    one = step_time(cluster(8), layer(), training(stages=1, devices=64), in_order(256, 64, 8), loads)
    assert one.bubble == 0


def test_a_zipf_trace_is_what_it_says():
    trace = zipf_trace(3, 4, 50, exponent=1.0, drift=0.0, slots=10**6, seed=5)
    assert trace.shape == (3, 4, 50)
    assert (trace.sum(axis=2) == 10**6).all()
    shares = np.sort(trace[0, 0])[::-1] / 10**6
    assert shares == pytest.approx(1 / np.arange(1, 51) / (1 / np.arange(1, 51)).sum(), abs=2e-3)
    assert np.array_equal(trace, zipf_trace(3, 4, 50, exponent=1.0, drift=0.0, slots=10**6, seed=5))
    assert not np.array_equal(trace[0].argsort(), np.tile(trace[0, 0].argsort(), (4, 1)))
    moved = zipf_trace(40, 1, 50, exponent=1.0, drift=0.2)
    assert np.corrcoef(moved[0, 0], moved[-1, 0])[0, 1] < np.corrcoef(moved[0, 0], moved[1, 0])[0, 1]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Link(0.0, 1e-6), "Link: bandwidth must be positive, got 0.0"),
        (lambda: Link(1e9, -1.0), "Link: latency must be finite and at least 0.0, got -1.0"),
        (lambda: cluster(0), "Cluster: nodes must be at least 1, got 0"),
        (lambda: dataclasses.replace(H800, rate=0.0), "Cluster: rate must be positive"),
        (lambda: H800.of_devices(12), "Cluster.of_devices: devices must be a multiple of 8, got 12"),
        (lambda: layer(send="all"), "Layer: send must be one of 'node', 'device', 'expert', got 'all'"),
        (lambda: layer(tokens=0), "Layer: tokens must be at least 1, got 0"),
        (lambda: training(stages=3), "Training: devices must be a multiple of stages"),
        (lambda: layer_traffic(cluster(2), layer(), in_order(256, 8), np.ones(256)), "plan must be for 16 devices"),
        (lambda: layer_traffic(cluster(1), layer(), in_order(256, 8), np.ones(255)), "loads must be of shape"),
        (
            lambda: step_time(cluster(2), layer(), training(devices=24, stages=3), in_order(256, 16), np.ones(256)),
            "step_time: training.devices must be 3 stages of whole clusters of 16, got 24",
        ),
        (lambda: zipf_trace(1, 0, 4), "zipf_trace: layers must be at least 1, got 0"),
        (lambda: zipf_trace(1, 1, 4, drift=-1), "zipf_trace: drift must be finite and at least 0.0"),
    ],
)
def test_a_mistake_is_one_sentence(make, sentence):
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fewer_devices_than_a_node_share_one():
    assert (H800.of_devices(4).nodes, H800.of_devices(4).devices_per_node) == (1, 4)
    assert (H800.of_devices(64).nodes, H800.devices) == (8, 64)
