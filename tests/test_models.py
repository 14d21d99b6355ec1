"""AE, RAE, VAE, RVAE: shapes, layer counts, losses against fp64 formulas, modes, safety, compilation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rvae_fast
from rvae_fast._architecture import residual_stages
from rvae_fast.models import AE, MODELS, RAE, RVAE, VAE, Output
from rvae_fast.nn import ResidualBlock

ALL = [AE, RAE, VAE, RVAE]
VARIATIONAL = [VAE, RVAE]


def linears(module):
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("n_layers", [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 33, 100])
def test_n_layers_counts_linear_layers_a_side(model, n_layers):
    net = model(24, 3, n_layers=n_layers)
    assert len(linears(net.encoder)) == n_layers
    assert len(linears(net.decoder)) == n_layers


def test_stages_of_the_article_s_ten_layers():
    stages = residual_stages(784, 20, n_layers=10, layers=2)
    assert stages.widths == (784, 593, 402, 211)
    assert stages.blocks == (1, 1, 1, 0)
    assert [layer.in_features for layer in linears(AE(784).encoder)] == [
        784,
        708,
        631,
        555,
        478,
        402,
        326,
        249,
        173,
        96,
    ]


def test_so_many_stages_at_most():
    for n_layers in (2, 4, 8, 10, 32, 100):
        plan = residual_stages(784, 20, n_layers=n_layers, layers=2, stages=2)
        assert plan.widths == (784, 402)
        assert plan.n_layers(2, 784) == n_layers
    assert residual_stages(784, 20, n_layers=10, layers=2, stages=2).blocks == (2, 2)
    assert residual_stages(24, 3, n_layers=11, layers=2, stages=1).blocks == (5,)
    assert residual_stages(24, 3, n_layers=10, layers=2, stages=1).blocks == (2, 2), "nine layers do not fill units"
    model = RVAE(24, 3, n_layers=11, stages=1)
    again = RVAE(**model.config())
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]
    assert len(list(again.encoder)) == 2


@pytest.mark.parametrize("stages", [0, 1.5, True])
@pytest.mark.parametrize("model", [AE, RVAE])
def test_stages_must_be_a_number_of_them(model, stages):
    with pytest.raises((TypeError, ValueError), match=r"stages must be .*1.*got"):
        model(24, 3, stages=stages)


def test_decoder_mirrors_encoder():
    net = RVAE(50, 4, n_layers=11)
    encoder = [(layer.in_features, layer.out_features) for layer in linears(net.encoder)]
    decoder = [(layer.out_features, layer.in_features) for layer in linears(net.decoder)]
    encoder[-1] = (encoder[-1][0], 4)  # the encoder's last layer gives mu and logvar
    assert decoder[::-1] == encoder


def test_explicit_stages_and_projection():
    net = RVAE(40, 5, widths=(128, 32), blocks=(3, 1), layers=2)
    assert [layer.out_features for layer in linears(net.encoder)] == [128] * 7 + [32] * 3 + [10]
    assert len(linears(net.decoder)) == 11
    assert net(torch.randn(6, 40)).reconstruction.shape == (6, 40)
    same = RVAE(128, 5, widths=(128,), blocks=2)
    assert len(linears(same.encoder)) == 5, "no projection where the first stage has the input's width"


@pytest.mark.parametrize("model", ALL)
def test_output(model):
    net = model(12, 3, n_layers=4)
    out = net(torch.randn(7, 12))
    assert isinstance(out, Output)
    assert out.reconstruction.shape == (7, 12)
    assert out.z.shape == (7, 3)
    if net.is_variational:
        assert out.mu.shape == out.logvar.shape == (7, 3)
    else:
        assert out.mu is None
        assert out.logvar is None


@pytest.mark.parametrize("likelihood", ["squared", "absolute", "bernoulli"])
@pytest.mark.parametrize("model", ALL)
def test_loss_against_the_formula_in_fp64(model, likelihood):
    torch.manual_seed(1)
    net = model(9, 3, n_layers=4, likelihood=likelihood).double().eval()
    x = torch.rand(8, 9, dtype=torch.float64)
    out = net(x)
    if likelihood == "squared":
        error = ((x - out.reconstruction) ** 2).sum(1)
    elif likelihood == "absolute":
        error = (x - out.reconstruction).abs().sum(1)
    else:
        error = F.binary_cross_entropy(out.reconstruction, x, reduction="none").sum(1)
        assert out.reconstruction.min() >= 0
        assert out.reconstruction.max() <= 1
    kld = torch.zeros(8, dtype=torch.float64)
    if net.is_variational:
        kld = -0.5 * (1 + out.logvar - out.mu**2 - out.logvar.exp()).sum(1)
    torch.testing.assert_close(net.loss(x, kld_weight=0.3), (error + 0.3 * kld).mean())
    torch.testing.assert_close(net.anomaly_score(x), error)
    torch.testing.assert_close(net.anomaly_score(x, kld_weight=2.0), error + 2 * kld)


@pytest.mark.parametrize("model", ALL)
def test_gradients_reach_every_parameter(model):
    torch.manual_seed(0)
    net = model(10, 3, n_layers=6, init="default")
    net.loss(torch.randn(16, 10)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("model", VARIATIONAL)
def test_z_is_sampled_while_training_and_the_mean_in_eval(model):
    net = model(8, 4, n_layers=4)
    x = torch.randn(2000, 8)
    torch.manual_seed(3)
    out = net(x)
    noise = (out.z - out.mu) / (0.5 * out.logvar).exp()
    assert abs(noise.mean().item()) < 0.05
    assert abs(noise.std().item() - 1) < 0.05
    torch.manual_seed(3)
    assert torch.equal(net(x).z, out.z), "reproducible from torch's generator"
    net.eval()
    assert torch.equal(net(x).z, net(x).mu)


@pytest.mark.parametrize("model", ALL)
def test_anomaly_score_is_deterministic_and_leaves_the_mode_alone(model):
    net = model(10, 3, n_layers=6, dropout=0.0)
    net(torch.randn(64, 10))
    frozen = next(m for m in net.modules() if isinstance(m, nn.BatchNorm1d))
    frozen.eval()
    buffers = [b.clone() for b in net.buffers()]
    x = torch.randn(5, 10)
    first = net.anomaly_score(x)
    assert torch.equal(first, net.anomaly_score(x))
    assert not first.requires_grad
    assert first.shape == (5,)
    assert net.training
    assert not frozen.training
    assert all(torch.equal(a, b) for a, b in zip(buffers, net.buffers(), strict=True))
    torch.testing.assert_close(net.anomaly_score(x[:1]), first[:1])
    assert net.anomaly_score(x[:0]).shape == (0,)
    with pytest.raises(ValueError, match="x must have shape"):
        net.anomaly_score(torch.randn(5, 11))
    assert net.training, "an error leaves the mode alone too"


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_logvar_stays_in_range_with_a_gradient(value):
    net = VAE(6, 2, n_layers=2, logvar_range=(-8.0, 4.0))
    with torch.no_grad():
        net.encoder[-1].bias[2:] = value
    x = torch.randn(16, 6)
    logvar = net(x).logvar
    assert logvar.min() >= -8.0 - 1e-5
    assert logvar.max() <= 4.0 + 1e-5
    assert torch.isfinite(net.loss(x))
    # in the middle of the range the bound does next to nothing
    wide = VAE(6, 2, n_layers=1).eval()
    mu_logvar = wide.encoder(x)
    torch.testing.assert_close(wide(x).logvar, mu_logvar[:, 2:], atol=2e-4, rtol=0)


def test_logvar_just_outside_the_range_still_has_a_gradient():
    net = VAE(6, 2, n_layers=1, logvar_range=(-8.0, 4.0))
    with torch.no_grad():
        net.encoder[-1].bias[2:] = 9.0
    net.loss(torch.randn(16, 6)).backward()
    assert net.encoder[-1].bias.grad[2:].abs().min() > 0


@pytest.mark.parametrize("model", ALL)
def test_config_rebuilds_the_model(model):
    import json

    net = model(11, 3, n_layers=5, activation="elu", order="post", likelihood="absolute", momentum=None)
    config = json.loads(json.dumps(net.config()))
    twin = MODELS[type(net).__name__](**config)
    twin.load_state_dict(net.state_dict())
    x = torch.randn(4, 11)
    assert torch.equal(twin.anomaly_score(x), net.anomaly_score(x))
    config["activation"] = "relu"
    assert net.config()["activation"] == "elu", "the configuration handed out is a copy"


def test_denoising_target():
    net = AE(7, 2, n_layers=2).double().eval()
    x, target = torch.randn(2, 5, 7, dtype=torch.float64)
    error, kld = net.loss_terms(x, target)
    torch.testing.assert_close(error, (net(x).reconstruction - target).square().sum(1))
    assert torch.equal(kld, torch.zeros_like(kld))


@pytest.mark.parametrize("order", ["pre", "post"])
def test_zero_init_makes_100_layers_start_shallow(order):
    torch.manual_seed(0)
    net = RVAE(30, 5, n_layers=100, order=order)
    assert all(block.zero_init for block in net.modules() if isinstance(block, ResidualBlock))
    loss = net.loss(torch.rand(64, 30))
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    assert torch.isfinite(loss)
    assert math.isfinite(norm)
    assert loss < 1e3


@pytest.mark.parametrize("model", ALL)
def test_autocast(model):
    net = model(16, 4, n_layers=6)
    x = torch.rand(64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        error, kld = net.loss_terms(x)
        out = net(x)
    assert error.dtype == kld.dtype == torch.float32
    if net.is_variational:
        assert out.mu.dtype == out.logvar.dtype == torch.float32
    net.eval()
    with torch.autocast("cpu", torch.bfloat16):
        low = net.anomaly_score(x)
    torch.testing.assert_close(low, net.anomaly_score(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("model", ALL)
def test_compile_fullgraph_by_value(model):
    net = model(12, 3, n_layers=4).eval()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, 12)
    for a, b in zip(compiled(x), net(x), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
    loss = torch.compile(net.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(loss(x), net.loss(x))


@pytest.mark.slow
def test_compile_training_by_inductor():
    torch.manual_seed(0)
    # fp64: the bias before a BatchNorm has a gradient of zero, which fp32 rounding would drown
    net = RVAE(12, 3, n_layers=4, init="default").double()
    twin = RVAE(12, 3, n_layers=4, init="default").double()
    twin.load_state_dict(net.state_dict())
    x = torch.randn(33, 12, dtype=torch.float64)
    # sampling differs between eager and inductor's generator: compare at the mean of z with batch statistics
    for module in (net, twin):
        module.forward_mean = lambda x, m=module: m.decoder(m.encoder(x)[:, :3])
    out = torch.compile(net.forward_mean, fullgraph=True)(x)
    ref = twin.forward_mean(x)
    torch.testing.assert_close(out, ref)
    out.square().sum().backward()
    ref.square().sum().backward()
    for (name, a), (_, b) in zip(net.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("model", ALL)
def test_export(model):
    net = model(12, 3, n_layers=4).eval()
    program = torch.export.export(net, (torch.randn(4, 12),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.randn(13, 12)
    torch.testing.assert_close(program.module()(x).reconstruction, net(x).reconstruction)


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_without_data(model, dtype):
    """On the meta device, as tools do that count parameters, operations or memory beforehand."""
    net = model(24, latent_features=4, n_layers=4).to("meta", dtype)
    x = torch.empty(5, 24, device="meta", dtype=dtype)
    net.loss(x).backward()
    assert net(x).reconstruction.shape == (5, 24)
    assert net.anomaly_score(x).shape == (5,)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())


def test_encode_and_decode():
    x = torch.randn(4, 12)
    vae = RVAE(12, 3, n_layers=4, likelihood="bernoulli").eval()
    mu, logvar = vae.encode(x)
    torch.testing.assert_close(vae.decode(mu), vae(x).reconstruction)
    torch.testing.assert_close(logvar, vae(x).logvar)
    ae = RAE(12, 3, n_layers=4).eval()
    torch.testing.assert_close(ae.decode(ae.encode(x)), ae(x).reconstruction)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_16_bit_models(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide, x = MODELS[name](8, 2, n_layers=4), torch.rand(32, 8)
    model, rows = copy.deepcopy(wide).to(dtype), x.to(dtype)
    out = model(rows)
    assert out.reconstruction.dtype == dtype
    model.loss(rows).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval(), wide.load_state_dict(model.float().state_dict()), model.to(dtype)
    exact = wide.eval().anomaly_score(rows.float())
    for scores in (model.anomaly_score(rows), model.decode(model(rows).z).sub(rows).float().square().sum(1)):
        torch.testing.assert_close(scores.float(), exact, rtol=0.05, atol=0.02)
    torch.testing.assert_close(torch.as_tensor(rvae_fast.freeze(model)(rows)).float(), exact, rtol=0.05, atol=0.02)
