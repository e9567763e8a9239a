"""Models of transformers with pyroute's experts and routers on CUDA tensors: their own logits and gradients."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5")

import emulated  # noqa: E402
import tensors  # noqa: E402
import transformers_families as tiny  # noqa: E402
from test_transformers import run  # noqa: E402

from pyroute.integrations import transformers as integration  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.fixture(autouse=True)
def installed():
    integration.install()
    yield
    integration.uninstall()


# one with groups and a selection bias, one with transposed weights and biases, one whose activation takes the steps
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen3_moe"])
def test_a_swapped_model_is_the_model(family, monkeypatch):
    model = tiny.tiny_model(family)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    logits, gradients = run(model, ids)
    model = copy.deepcopy(model).to(tensors.DEVICE)
    tensors.emulate(monkeypatch.setattr)
    integration.swap(model)
    again, others = run(model, ids.to(tensors.DEVICE))
    assert emulated.REAL or emulated.launched()
    assert (again.cpu() - logits).abs().max() <= 2e-4 * logits.abs().max()
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        distance = (others[name].cpu() - gradient).abs().max()
        assert distance <= 2e-4 * max(g.abs().max() for g in gradients.values()), name
