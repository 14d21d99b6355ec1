"""Steps whose gradients one native call takes: the same as autograd's, and who may not take them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from rvae_fast import _backend, _stepper
from rvae_fast._direct_gradients import DirectGradients
from rvae_fast.models import Autoencoder
from rvae_fast.ops import residual_stack
from rvae_fast.training import TrainingConfig, train

pytestmark = pytest.mark.skipif(
    _backend.available_backends()["native"] is not None, reason="there are no native kernels"
)
needs_bf16 = pytest.mark.skipif(not residual_stack.HAS_BF16_PRODUCTS, reason="this CPU has no bf16 products")
OPTIONS: dict[str, Any] = {
    "batch_size": 16, "seed": 3, "learning_rate": 0.02, "max_grad_norm": 1.0, "kld_warmup_epochs": 1.5, "epochs": 3,
    "device": "cpu", "weight_decay": 0.01,
}  # fmt: skip


class Count:
    """Counts the batches that went the direct way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken = self.asked = 0
        plain = DirectGradients.__call__

        def counted(own: DirectGradients, *args: Any, **options: Any) -> Tensor | None:
            terms = plain(own, *args, **options)
            self.asked += 1
            self.taken += terms is not None
            return terms

        monkeypatch.setattr(DirectGradients, "__call__", counted)


class Never(DirectGradients):
    """Leaves every batch to autograd."""

    def look(self, x: Tensor) -> None:
        pass


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
@pytest.mark.parametrize("likelihood", ["squared", "absolute", "bernoulli"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", ["AE", "VAE"])
def test_steps_are_those_of_autograd(
    name: str, accumulate: int, likelihood: str, precision: str, model: Any, table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same random numbers, same batches, a short last one among them: same record, weights and statistics."""
    data = table(100).sigmoid()
    config = TrainingConfig(**OPTIONS, accumulate=accumulate, precision=precision)
    count = Count(monkeypatch)
    history = train(direct := model(name, likelihood=likelihood), data, config)
    assert count.taken == count.asked == 3 * 7
    monkeypatch.setattr(_stepper, "DirectGradients", Never)
    expected = train(other := model(name, likelihood=likelihood), data, config)
    torch.testing.assert_close(torch.tensor(history.steps), torch.tensor(expected.steps), rtol=1e-5, atol=1e-5)
    for (key, a), b in zip(direct.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=key)


def look(net: Autoencoder, x: Tensor) -> DirectGradients:
    direct = DirectGradients(net, [p for p in net.parameters() if p.requires_grad])
    direct.look(x)
    return direct


@pytest.mark.parametrize("name", ["AE", "VAE"])
def test_gradients_are_those_of_backward(name: str, model: Any, table: Any) -> None:
    net, x = model(name).train(), table(50)
    twin = copy.deepcopy(net)
    torch.manual_seed(1)
    terms = look(net, x)(x, 50, 0.3, add=False)
    torch.manual_seed(1)
    error, kld = twin.loss_terms(x)
    loss = error.sum() / 50 + 0.3 * (kld.sum() / 50)
    loss.backward()
    assert terms is not None
    assert terms.tolist() == [float(loss), float(error.sum() / 50), float(kld.sum() / 50)]
    for (key, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        assert torch.equal(a.grad, b.grad), key
    for a, b in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "why", ["residual", "frozen", "shared", "module hook", "gradient hook", "after gradient", "eval", "frozen norm",
            "cumulative", "own loss", "fp64", "reference", "one row"]
)  # fmt: skip
def test_what_autograd_has_to_do(why: str, model: Any, table: Any) -> None:
    momentum = None if why == "cumulative" else 0.1
    net, x, backend = model("RAE" if why == "residual" else "AE", momentum=momentum).train(), table(50), "auto"
    if why == "frozen":
        net.encoder[0].bias.requires_grad_(False)
    elif why == "shared":
        net.encoder[0].bias = net.encoder[1].bias
    elif why == "module hook":
        net.encoder[1].register_forward_hook(lambda *_: None)
    elif why == "gradient hook":
        net.encoder[0].weight.register_hook(lambda g: g)
    elif why == "after gradient":
        net.encoder[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    elif why == "eval":
        net.eval()
    elif why == "frozen norm":
        net.encoder[1].eval()
    elif why == "own loss":
        net.loss_terms = lambda x: None
    elif why == "fp64":
        net, x = net.double(), x.double()
    elif why == "reference":
        backend = "reference"
    elif why == "one row":
        x = x[:1]
    with _backend.backend(backend):
        assert look(net, x)(x, 50, 1.0, add=False) is None
    assert all(p.grad is None for p in net.parameters())
