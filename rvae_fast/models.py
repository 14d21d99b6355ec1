"""AE, RAE, VAE and RVAE: fully connected autoencoders, plain and residual, ordinary and variational.

The residual ones (RAE, RVAE) are sequences of stages: residual units of constant width, then a plain linear transition
to the next width; the decoder mirrors the encoder. The plain ones (AE, VAE) are Linear -> BatchNorm -> activation with
widths spaced linearly, the last layer of encoder and decoder bare. A VAE's loss is the reconstruction error plus the
Kullback-Leibler divergence of its posterior from the standard normal (Kingma and Welling 2014, equation 7 and
appendix B), a row's anomaly score its reconstruction error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rvae_fast import reference
from rvae_fast._activations import check_activation
from rvae_fast._architecture import (
    MAX_STAGES,
    check_norm_options,
    check_number,
    finite_range,
    one_of,
    plain_widths,
    positive_int,
    residual_stages,
)
from rvae_fast._modes import in_eval
from rvae_fast._networks import plain_net, residual_net
from rvae_fast._norms import untouched, watched
from rvae_fast.nn import ORDERS, Transition, check_rows
from rvae_fast.ops import posterior
from rvae_fast.ops.decoder_error import autocasts, decoder_error
from rvae_fast.ops.decoder_error import is_fused as has_decoder_error
from rvae_fast.ops.reconstruction_kld import reconstruction_kld
from rvae_fast.ops.reparameterise import is_fused, reparameterise

LIKELIHOODS = ("squared", "absolute", "bernoulli")
INITS = ("zero", "default")


class Output(NamedTuple):
    """What a model returns for rows ``[batch, in_features]``."""

    #: ``[batch, in_features]``, in the input's units (for ``likelihood="bernoulli"`` probabilities).
    reconstruction: Tensor
    #: Mean of the posterior ``[batch, latent_features]``; None for AE and RAE.
    mu: Tensor | None
    #: Log variance of the posterior ``[batch, latent_features]``; None for AE and RAE.
    logvar: Tensor | None
    #: The code the decoder saw ``[batch, latent_features]``: a sample while training, the mean otherwise.
    z: Tensor


class Autoencoder(nn.Module):
    """What the four models share; make an :class:`AE`, :class:`RAE`, :class:`VAE` or :class:`RVAE`.

    Parameters
    ----------
    in_features : int
        Width of a row.
    latent_features : int, default 20
        Width of the bottleneck ``z``.
    n_layers : int, default 10
        Linear layers of the encoder, as the article counts; the whole network has twice as many.
    widths : sequence of int, optional
        Instead of ``n_layers``: the width of each stage (residual models) or of each hidden layer (plain models). When
        the first stage's differs from ``in_features``, a projection leads to it.
    blocks : int or sequence of int, optional
        Residual units of each stage; needs ``widths``. Residual models only.
    stages : int, default 4
        At most so many stages are made of ``n_layers`` (layers that fill no unit are further ones). A stage ends in a
        transition, which no unit skips: fewer stages keep more of the width and of the identity path, for more work a
        layer. Without effect beside ``widths`` and in plain models.
    order : {"pre", "post"}, default "pre"
        Kind of residual unit, see :class:`rvae_fast.ResidualBlock`. The plain models have no units: there it is
        checked and has no effect.
    layers : int, default 2
        Linear layers of a residual unit.
    activation, negative_slope
        See :class:`rvae_fast.ResidualBlock`.
    likelihood : {"squared", "absolute", "bernoulli"}, default "squared"
        Reconstruction error: summed squared error, summed absolute error, or binary cross-entropy of inputs in [0, 1]
        against the decoder's output as logits.
    dropout : float, default 0.0
        On the branch of every residual unit. Residual models only.
    init : {"zero", "default"}, default "zero"
        ``"zero"`` starts every residual unit as the identity (see ``zero_init`` of :class:`rvae_fast.ResidualBlock`),
        which trains 100 and more layers and reaches a lower loss at ten; ``"default"`` is PyTorch's.
    eps, momentum
        Of every BatchNorm.
    logvar_range : (float, float), default (-20.0, 10.0)
        The log variance is kept inside by a smooth bound, so that its exponential can neither overflow nor lose its
        gradient. Variational models only.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what was expected.
    """

    is_variational: ClassVar[bool]
    is_residual: ClassVar[bool]

    def __init__(
        self,
        in_features: int,
        latent_features: int = 20,
        *,
        n_layers: int = 10,
        widths: Sequence[int] | None = None,
        blocks: int | Sequence[int] | None = None,
        stages: int = MAX_STAGES,
        order: str = "pre",
        layers: int = 2,
        activation: str = "leaky_relu",
        negative_slope: float = 0.01,
        likelihood: str = "squared",
        dropout: float = 0.0,
        init: str = "zero",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        logvar_range: tuple[float, float] = (-20.0, 10.0),
    ) -> None:
        super().__init__()
        self.in_features = positive_int("in_features", in_features)
        self.latent_features = positive_int("latent_features", latent_features)
        stages = positive_int("stages", stages)
        check_activation(activation, negative_slope)
        one_of("order", order, ORDERS)
        one_of("likelihood", likelihood, LIKELIHOODS)
        one_of("init", init, INITS)
        low, high = finite_range("logvar_range", logvar_range)
        check_norm_options(eps, momentum)
        if not self.is_residual and blocks is not None:
            raise ValueError(
                f"blocks is for residual models, {type(self).__name__} has none: expected None, got {blocks!r}"
            )
        if not self.is_residual and dropout:
            raise ValueError(f"dropout is for residual models: {type(self).__name__} expects 0.0, got {dropout!r}")
        check_number("dropout", dropout, "in [0, 1)")
        self.likelihood = likelihood
        self._config: dict[str, Any] = {
            "in_features": self.in_features,
            "latent_features": self.latent_features,
            "n_layers": n_layers,
            "widths": list(widths) if isinstance(widths, Sequence) else widths,
            "blocks": list(blocks) if isinstance(blocks, Sequence) else blocks,
            "stages": stages,
            "order": order,
            "layers": layers,
            "activation": activation,
            "negative_slope": float(negative_slope),
            "likelihood": likelihood,
            "dropout": float(dropout),
            "init": init,
            "eps": float(eps),
            "momentum": momentum,
            "logvar_range": [float(low), float(high)],
        }
        code = self.latent_features * (2 if self.is_variational else 1)
        if self.is_residual:
            plan = residual_stages(
                self.in_features, self.latent_features,
                n_layers=n_layers, layers=layers, widths=widths, blocks=blocks, stages=stages,
            )  # fmt: skip
            options: dict[str, Any] = {
                "layers": layers, "order": order, "activation": activation, "negative_slope": negative_slope,
                "eps": eps, "momentum": momentum, "dropout": dropout, "zero_init": init == "zero",
            }  # fmt: skip
            self.encoder, self.decoder = residual_net(self.in_features, self.latent_features, code, plan, options)
        else:
            hidden = plain_widths(self.in_features, self.latent_features, n_layers=n_layers, widths=widths)
            self.encoder = plain_net((*hidden[:-1], code), activation, negative_slope, eps, momentum)
            self.decoder = plain_net(hidden[::-1], activation, negative_slope, eps, momentum)

    @property
    def logvar_range(self) -> tuple[float, float]:
        """Between which two numbers the log variance of the posterior is kept."""
        low, high = self._config["logvar_range"]
        return low, high

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values: ``type(model)(**model.config())`` has the same shape."""
        config = {k: list(v) if isinstance(v, list) else v for k, v in self._config.items()}
        return config | {"likelihood": self.likelihood}  # an attribute that may have been set since

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        code = self.encoder(x)
        return reference.posterior(code, *self.logvar_range) if self.is_variational else (code, None)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
        """The decoder's raw output (logits for ``bernoulli``), mu, logvar, z, and the divergence if it came along."""
        check_rows("x", x, self.in_features)
        if not (self.is_variational and self.training):
            mu, logvar = self._encode(x)
            return self.decoder(self._as_decoded(mu)), mu, logvar, mu, None
        code, kld = self.encoder(x), None
        if posterior.covers(code):
            mu, logvar, z = posterior.sample_posterior(code, *self.logvar_range)
        else:
            mu, logvar = reference.posterior(code, *self.logvar_range)
            if is_fused(mu, logvar):
                z, kld = reparameterise(mu, logvar)
            else:
                z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return self.decoder(self._as_decoded(z)), mu, logvar, z, kld

    def _as_decoded(self, z: Tensor) -> Tensor:
        """A code for the decoder: that of a 16-bit VAE comes in fp32, which its layers would refuse."""
        if z.dtype != torch.float32 or not self.is_variational:
            return z
        dtype = next(self.decoder.parameters()).dtype
        half = dtype in (torch.bfloat16, torch.float16)
        return z.to(dtype) if half and not autocasts(z.device) else z

    def forward(self, x: Tensor) -> Output:
        """Reconstruct rows.

        Parameters
        ----------
        x : Tensor [batch, in_features]

        Returns
        -------
        Output
            ``reconstruction``, ``mu``, ``logvar``, ``z``. While training, the VAEs' ``z`` is sampled from torch's
            global generator; in eval it is the mean.
        """
        raw, mu, logvar, z, _ = self._forward(x)
        reconstruction = torch.sigmoid(raw) if self.likelihood == "bernoulli" else raw
        return Output(reconstruction, mu if self.is_variational else None, logvar, z)

    def encode(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The code ``[batch, latent_features]`` of rows, or for a VAE the pair ``(mu, logvar)``."""
        check_rows("x", x, self.in_features)
        mu, logvar = self._encode(x)
        return mu if logvar is None else (mu, logvar)

    def decode(self, z: Tensor) -> Tensor:
        """Rows ``[batch, in_features]``, in the input's units, of codes ``[batch, latent_features]``."""
        check_rows("z", z, self.latent_features)
        raw: Tensor = self.decoder(self._as_decoded(z))
        return torch.sigmoid(raw) if self.likelihood == "bernoulli" else raw

    def loss_terms(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Per-row reconstruction error and KL divergence, both summed over features: two tensors ``[batch]``.

        Parameters
        ----------
        x : Tensor [batch, in_features]
        target : Tensor [batch, in_features], optional
            What to reconstruct when it is not ``x`` itself (denoising).
        """
        raw, mu, logvar, _, kld = self._forward(x)
        variational = (mu, logvar) if self.is_variational and kld is None else (None, None)
        error, none_or_kld = reconstruction_kld(
            x if target is None else target, raw, *variational, likelihood=self.likelihood
        )
        return error, none_or_kld if kld is None else kld

    def feature_errors(self, x: Tensor) -> Tensor:
        """What each value adds to its row's reconstruction error ``[batch, in_features]``."""
        raw = self._forward(x)[0]
        if self.likelihood == "bernoulli":
            return F.binary_cross_entropy_with_logits(raw.to(x.dtype), x, reduction="none")
        difference = raw.to(x.dtype) - x
        return difference.square() if self.likelihood == "squared" else difference.abs()

    def loss(self, x: Tensor, kld_weight: float = 1.0) -> Tensor:
        """Training loss: the mean over rows of error + ``kld_weight`` * KL (the negative ELBO up to constants).

        While training, z is sampled; in eval it is the mean, so a validation loss is free of that noise.
        """
        error, kld = self.loss_terms(x)
        return (error + kld_weight * kld).mean() if self.is_variational else error.mean()

    @torch.no_grad()
    def anomaly_score(self, x: Tensor, kld_weight: float = 0.0) -> Tensor:
        """Score rows: higher is more anomalous.

        The reconstruction error from the mean of z, with the BatchNorms' running statistics, plus ``kld_weight`` times
        the KL divergence. Deterministic; the model's own training mode is left as it was.

        Parameters
        ----------
        x : Tensor [batch, in_features]
        kld_weight : float, default 0.0
            1.0 gives the negative ELBO at the mean of z. The article scores by the error alone.

        Returns
        -------
        Tensor [batch], fp32 (fp64 for an fp64 model)
        """
        with in_eval(self):
            fused = has_decoder_error(x) and _is_plain_linear(self.decoder[-1])
            error, kld = self._fused_score_terms(x, kld_weight != 0) if fused else self.loss_terms(x)
        return error + kld_weight * kld if kld_weight and self.is_variational else error

    def _fused_score_terms(self, x: Tensor, want_kld: bool) -> tuple[Tensor, Tensor]:
        """:meth:`loss_terms` in eval of a decoder that ends in a linear layer: the reconstruction is not written."""
        check_rows("x", x, self.in_features)
        mu, logvar = self._encode(x)
        last: Any = self.decoder[-1]
        h = self.decoder[:-1](self._as_decoded(mu))
        error = decoder_error(h, last.weight, last.bias, x, likelihood=self.likelihood)
        kld = reference.kld(mu, logvar) if want_kld and logvar is not None else torch.zeros_like(error)
        return error, kld


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether calling ``module`` is the product with its weight and nothing else (no hooks, no parametrisation)."""
    return type(module) in (nn.Linear, Transition) and not watched() and untouched((module,), type(module))


class AE(Autoencoder):
    """Plain autoencoder, trained on the reconstruction error alone. See :class:`Autoencoder`."""

    is_variational, is_residual = False, False


class RAE(Autoencoder):
    """Residual autoencoder: stages of residual units, trained on the reconstruction error. See :class:`Autoencoder`."""

    is_variational, is_residual = False, True


class VAE(Autoencoder):
    """Plain variational autoencoder (Kingma and Welling 2014). See :class:`Autoencoder`."""

    is_variational, is_residual = True, False


class RVAE(Autoencoder):
    """Residual variational autoencoder, the article's. See :class:`Autoencoder`.

    Examples
    --------
    >>> import torch
    >>> from rvae_fast import RVAE
    >>> model = RVAE(64, latent_features=8, n_layers=7)
    >>> model.loss(torch.rand(32, 64)).shape, model.anomaly_score(torch.rand(5, 64)).shape
    (torch.Size([]), torch.Size([5]))
    """

    is_variational, is_residual = True, True


MODELS: dict[str, type[Autoencoder]] = {"AE": AE, "RAE": RAE, "VAE": VAE, "RVAE": RVAE}
