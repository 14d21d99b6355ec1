"""Steps whose gradients one native call takes: the same as autograd's, and who may not take them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rvae_fast import _backend, _stepper
from rvae_fast._direct_gradients import DirectGradients
from rvae_fast._precision import autocast
from rvae_fast.models import RVAE, Autoencoder
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


#: The residual ones also with a projection before and behind, which a width of the first stage of its own asks for.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "AE": ("AE", {}),
    "VAE": ("VAE", {}),
    "RAE": ("RAE", {"order": "post"}),
    "RVAE": ("RVAE", {"order": "pre"}),
    "RVAE of widths": ("RVAE", {"widths": (8, 5), "blocks": (2, 1), "layers": 3, "activation": "silu"}),
}


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
@pytest.mark.parametrize("name", MODELS)
def test_steps_are_those_of_autograd(
    name: str, accumulate: int, likelihood: str, precision: str, model: Any, table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same random numbers, same batches, a short last one among them: same record, weights and statistics."""
    data = table(108).sigmoid()
    config = TrainingConfig(**OPTIONS, accumulate=accumulate, precision=precision)
    count = Count(monkeypatch)
    kind, options = MODELS[name]
    history = train(direct := model(kind, likelihood=likelihood, **options), data, config)
    assert count.taken == count.asked == 3 * 7
    monkeypatch.setattr(_stepper, "DirectGradients", Never)
    expected = train(other := model(kind, likelihood=likelihood, **options), data, config)
    # Products of PyTorch's (transitions in fp32) may round otherwise at another address, which Adam makes more of.
    bound = 1e-3 if precision == "fp32" and direct.is_residual else 1e-5
    torch.testing.assert_close(torch.tensor(history.steps), torch.tensor(expected.steps), rtol=bound, atol=bound)
    # The gradient of a bias ahead of a norm is zero but for rounding, of which Adam makes steps as long as any; the
    # mean that the norm takes away follows it.
    astray = OPTIONS["learning_rate"] if bound == 1e-3 else bound
    for (key, a), b in zip(direct.state_dict().items(), other.state_dict().values(), strict=True):
        shift = (".linears." in key and key.endswith(".bias")) or key.endswith(".running_mean")
        torch.testing.assert_close(a, b, rtol=10 * bound, atol=astray if shift else bound, msg=key)


def look(net: Autoencoder, x: Tensor) -> DirectGradients:
    direct = DirectGradients(net, [p for p in net.parameters() if p.requires_grad])
    direct.look(x)
    return direct


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_backward(name: str, precision: str, model: Any, table: Any) -> None:
    kind, options = MODELS[name]
    net, x = model(kind, **options).train(), table(50)
    twin = copy.deepcopy(net)
    with autocast(precision, x.device):
        torch.manual_seed(1)
        terms = look(net, x)(x, 50, 0.3, add=False)
        torch.manual_seed(1)
        error, kld = twin.loss_terms(x)
    loss = error.sum() / 50 + 0.3 * (kld.sum() / 50)
    loss.backward()
    assert terms is not None
    assert not terms.requires_grad
    # To the bit, but for transitions in fp32: there autograd's are PyTorch's.
    bound = {"rtol": 2e-6, "atol": 2e-6} if precision == "fp32" and net.is_residual else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(terms, torch.stack((loss, error.sum() / 50, kld.sum() / 50)).detach(), **bound)
    for (key, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        scale = max(1.0, float(b.grad.abs().max()))
        torch.testing.assert_close(a.grad / scale, b.grad / scale, msg=lambda text, key=key: f"{key}: {text}", **bound)
    for a, b in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, **bound)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_small_layers_stay_with_one_thread(precision: str, model: Any, table: Any) -> None:
    """Barriers would cost more than they save; and so the bits do not depend on the number of threads."""
    x, threads, found = table(256), torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            net = model("RVAE").train()
            with autocast(precision, x.device):
                torch.manual_seed(1)
                terms = look(net, x)(x, 256, 1.0, add=False)
            assert terms is not None
            found.append([terms, *(p.grad.clone() for p in net.parameters()), *net.buffers()])
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "why", ["dropout", "block hook", "backward hook", "global hook", "half a norm", "two activations", "frozen",
            "shared", "module hook", "gradient hook", "after gradient", "eval", "frozen norm", "cumulative", "own loss",
            "fp64", "reference", "one row"]
)  # fmt: skip
def test_what_autograd_has_to_do(why: str, model: Any, table: Any) -> None:
    momentum = None if why == "cumulative" else 0.1
    residual = {"dropout": {"dropout": 0.1}, "block hook": {}, "two activations": {}}
    kind = "RAE" if why in residual else "AE"
    net, x, backend = model(kind, momentum=momentum, **residual.get(why, {})).train(), table(50), "auto"
    handle = None
    if why == "block hook":
        net.encoder[0][0].register_forward_hook(lambda *_: None)
    elif why == "two activations":
        net.decoder[-1][0].activation = "relu"
    elif why == "backward hook":
        net.decoder.register_full_backward_hook(lambda *_: None)
    elif why == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    elif why == "half a norm":
        for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm1d)):
            norm.bias = None
    elif why == "frozen":
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
    try:
        with _backend.backend(backend):
            assert look(net, x)(x, 50, 1.0, add=False) is None
    finally:
        if handle is not None:
            handle.remove()
    assert all(p.grad is None for p in net.parameters())


@pytest.fixture
def double_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("double_by_default")
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "radam"])
def test_an_fp32_model_where_fp64_is_the_default(optimizer: str) -> None:
    model = RVAE(10, 3, n_layers=5).float()
    history = train(model, torch.randn(40, 10, dtype=torch.float32), TrainingConfig(**OPTIONS, optimizer=optimizer))
    assert len(history.epochs) == OPTIONS["epochs"]
    assert all(p.dtype == torch.float32 for p in model.parameters())
