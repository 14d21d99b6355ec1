"""A trained model frozen into a scorer: BatchNorms folded, weights packed once, rows to scores in one native call.

What the kernels read is written by :mod:`rvae_fast._program`; they are ``csrc/cpu/scorer.cpp`` and, for
:meth:`Scorer.pathway`, ``csrc/cpu/score_pathway.cpp``.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rvae_fast import _backend, _native
from rvae_fast._activations import ACTIVATIONS
from rvae_fast._covered import covers
from rvae_fast._program import steps_of, write
from rvae_fast._taps import COVERED, ends, taps
from rvae_fast._threads import alone_in_a_child
from rvae_fast._validation import check_choice
from rvae_fast.models import Autoencoder
from rvae_fast.ops.residual_stack import HAS_BF16_PRODUCTS
from rvae_fast.pathway import PATHWAYS, differences, reconstruct

PRECISIONS = ("auto", "fp32", "bf16")

_library = torch.library.Library("rvae_fast", "FRAGMENT")
_library.define(
    "score(Tensor x, Tensor program, Tensor weights, Tensor vectors, int latent, bool variational, float low, "
    "float high, str likelihood, int activation, float negative_slope, bool bf16, bool want_kld, bool want_latent, "
    "bool want_reconstruction, bool want_feature_error) -> Tensor[]"
)
_library.define(
    "score_pathway(Tensor x, Tensor program, Tensor weights, Tensor vectors, Tensor taps, int latent, "
    "bool variational, float low, float high, str likelihood, int activation, float negative_slope, bool bf16, "
    "bool include_input, bool want_latent, bool want_differences, int value_step, int value_width) -> Tensor[]"
)
_library.define("score_products(Tensor program, Tensor weights, int rows, bool bf16) -> ()")
_library.define("score_state(Tensor[] tensors) -> int")
_score_op = torch.ops.rvae_fast.score.default
_pathway_op = torch.ops.rvae_fast.score_pathway.default

_HAS_KERNELS: bool = _native.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(
    "rvae_fast::score", "CPU"
)
#: For each backend that has a scorer, the device types it covers.
IMPLEMENTED: dict[str, tuple[str, ...]] = {"native": ("cpu",)} if _HAS_KERNELS else {}


class Scores(NamedTuple):
    """What :meth:`Scorer.detailed` returns for rows ``[batch, in_features]``; all fp32, None where not asked for."""

    #: Reconstruction error of each row, summed over features ``[batch]``.
    error: Tensor
    #: KL divergence of each row's posterior from the standard normal ``[batch]``; zeros for AE and RAE.
    kld: Tensor | None
    #: The code, for a VAE the mean of its posterior ``[batch, latent_features]``.
    latent: Tensor | None
    #: ``[batch, in_features]`` (for ``likelihood="bernoulli"`` probabilities).
    reconstruction: Tensor | None
    #: Each feature's part of ``error`` ``[batch, in_features]``.
    feature_error: Tensor | None


class PathwayScores(NamedTuple):
    """What :meth:`Scorer.pathway` returns for rows ``[batch, in_features]``; None where not asked for."""

    #: Reconstruction error of each row, summed over features ``[batch]`` fp32.
    error: Tensor
    #: The code, for a VAE the mean of its posterior ``[batch, latent_features]`` fp32.
    latent: Tensor | None
    #: SAP: the squared differences, summed ``[batch]`` fp64.
    sap: Tensor
    #: The differences, place beside place ``[batch, D]`` fp32.
    differences: Tensor | None
    #: What the first modules of the encoder make of the rows ``[batch, width]`` fp32.
    inside: Tensor | None


class Scorer:
    """A frozen model: rows to anomaly scores. Made by :func:`freeze`.

    Attributes
    ----------
    in_features, latent_features : int
    precision : {"fp32", "bf16"}
        Of the products; scores and sums are fp32.
    pathways : tuple of str
        Those of :data:`rvae_fast.pathway.PATHWAYS` that :meth:`pathway` goes.
    backend : {"native", "reference"}
        ``"reference"`` where the native kernels do not cover the model (no native module, fp64 parameters, modules of
        other kinds or in another order than the models are built of), or another backend is in force
        (:class:`rvae_fast.backend`): a copy of the model then scores in plain PyTorch.

    Notes
    -----
    It keeps nothing between calls: any number of threads may score with one scorer, the GIL is released meanwhile, and
    rows are divided among PyTorch's threads (``torch.set_num_threads``). It can be copied and pickled.
    """

    def __init__(self, model: Autoencoder, precision: str) -> None:
        self.in_features = model.in_features
        self.latent_features = model.latent_features
        self.precision = precision
        self._likelihood = model.likelihood
        self._ends = ends(model)
        self._model: Autoencoder | None = None
        if _backend.choose("score", "cpu", IMPLEMENTED) != "native" or not covers(model):
            self.backend, self.pathways = "reference", tuple(PATHWAYS)
            self._model = copy.deepcopy(model).to("cpu").eval().requires_grad_(False)
            return
        self.backend, self.pathways = "native", COVERED
        config = model.config()
        program, weights, vectors = write(steps_of(model), precision == "bf16")
        self._program = (program, weights, vectors)
        self._taps = {name: taps(model, name) for name in COVERED}
        self._options = (
            model.latent_features, model.is_variational, *config["logvar_range"], model.likelihood,
            ACTIVATIONS.index(config["activation"]), config["negative_slope"], precision == "bf16",
        )  # fmt: skip

    def __call__(self, x: Tensor, kld_weight: float = 0.0) -> Tensor:
        """Score rows as ``model.anomaly_score`` does: higher is more anomalous.

        Parameters
        ----------
        x : Tensor [batch, in_features]
            Floating point; computed in fp32.
        kld_weight : float, default 0.0
            Weight of the KL divergence beside the reconstruction error.

        Returns
        -------
        Tensor [batch] fp32
        """
        if not kld_weight:
            return self.detailed(x).error
        scores = self.detailed(x, kld=True)
        assert scores.kld is not None
        return scores.error + kld_weight * scores.kld

    @torch.no_grad()
    def detailed(
        self,
        x: Tensor,
        *,
        kld: bool = False,
        latent: bool = False,
        reconstruction: bool = False,
        feature_error: bool = False,
    ) -> Scores:
        """The reconstruction error of rows and, where asked for, what it is made of.

        Raises
        ------
        TypeError, ValueError
            If ``x`` is not a floating-point tensor ``[batch, in_features]`` on the CPU.
        """
        self._check(x)
        if self._model is not None:
            return self._by_reference(x, kld, latent, reconstruction, feature_error)
        wanted = (kld, latent, reconstruction, feature_error)
        error, *others = _score_op(x, *self._program, *self._options, *wanted)
        return Scores(error, *(t if asked else None for t, asked in zip(others, wanted, strict=True)))

    @torch.no_grad()
    def pathway(
        self,
        x: Tensor,
        pathway: str = "stages",
        *,
        include_input: bool = True,
        latent: bool = False,
        differences: bool = False,
        inside: int = 0,
    ) -> PathwayScores:
        """Compare rows with their reconstructions inside the encoder, see :func:`rvae_fast.pathway.differences`.

        One call takes a tile of rows through the network and what comes out through the encoder once more; the first
        pass gives the error and the rows' own side of the comparison.

        Parameters
        ----------
        x : Tensor [batch, in_features]
            Floating point; computed in fp32.
        pathway : str, default "stages"
            One of :attr:`pathways`.
        include_input : bool, default True
            Whether the reconstruction's difference from the row itself comes first.
        latent, differences : bool, default False
            Whether they are wanted.
        inside : int, default 0
            How many modules of ``model.encoder`` the rows pass to what is wanted beside it; none unless given. They end
            with a whole stack of units, an activation or a transition.

        Raises
        ------
        TypeError, ValueError
            As :meth:`detailed`; also for another pathway, and for modules that end nowhere.
        """
        self._check(x)
        check_choice("pathway", pathway, self.pathways)
        if inside and inside not in self._ends:
            raise ValueError(f"inside must be 0 or among {', '.join(map(str, self._ends))}, got {inside!r}")
        if self._model is not None:
            return self._pathway_by_reference(x, pathway, include_input, latent, differences, inside)
        error, code, sap, written, values = _pathway_op(
            x, *self._program, self._taps[pathway], *self._options, include_input, latent, differences,
            *(self._ends[inside] if inside else (0, 0)),
        )  # fmt: skip
        return PathwayScores(
            error, code if latent else None, sap, written if differences else None, values if inside else None
        )

    def _check(self, x: Any) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point torch.Tensor, got {got}")
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x must have shape [batch, {self.in_features}], got {list(x.shape)}")
        if x.device.type != "cpu":
            raise ValueError(f"x must be on the CPU, where the scorer is, got {x.device}")

    def _pathway_by_reference(
        self, x: Tensor, pathway: str, include_input: bool, latent: bool, want_differences: bool, inside: int
    ) -> PathwayScores:
        model = self._model
        assert model is not None
        x = x.to(next(model.parameters()).dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            error, _ = model.loss_terms(x)
            code = model.encode(x)
            found = [d.float() for d in differences(model, x, reconstruct(model, x), pathway, include_input)]
            there: Tensor = model.encoder[:inside](x)
        mean = code[0] if isinstance(code, tuple) else code
        beside = torch.cat(found, 1)
        sap = beside.double().square().sum(1)
        return PathwayScores(
            error.float(), mean.float() if latent else None, sap, beside if want_differences else None,
            there.float() if inside else None,
        )  # fmt: skip

    def _by_reference(self, x: Tensor, kld: bool, latent: bool, reconstruction: bool, feature_error: bool) -> Scores:
        model = self._model
        assert model is not None
        x = x.to(next(model.parameters()).dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            error, divergence = model.loss_terms(x)
            out = model(x)
            features = model.feature_errors(x) if feature_error else None
        return Scores(
            error.float(),
            divergence.float() if kld else None,
            out.z.float() if latent else None,
            out.reconstruction.float() if reconstruction else None,
            None if features is None else features.float(),
        )


def freeze(model: Autoencoder, precision: str = "auto") -> Scorer:
    """Freeze a trained model into a scorer on the CPU.

    The scorer is a copy: later training does not change it. It computes what ``model.anomaly_score`` does, from the
    running statistics of the BatchNorms.

    Parameters
    ----------
    model : AE, RAE, VAE or RVAE
    precision : {"auto", "fp32", "bf16"}, default "auto"
        Of the matrix products. ``"auto"`` is fp32: a small reconstruction error is the difference of nearly equal
        numbers, of which bf16 keeps three digits. ``"bf16"`` ranks rows the same way where errors differ by more than
        that, up to twice as fast on CPUs with AVX512_BF16 and faster still with AMX.

    Returns
    -------
    Scorer

    Raises
    ------
    TypeError
        If ``model`` is not one of this package's models.
    ValueError
        An unknown precision, bf16 where the CPU has no bf16 products, or a BatchNorm without running statistics (it has
        no fixed transformation to fold).
    RuntimeError
        A backend is in force that has no scorer (``"triton"``).

    Examples
    --------
    >>> import torch
    >>> from rvae_fast import RVAE, freeze
    >>> scorer = freeze(RVAE(64, latent_features=8, n_layers=7))
    >>> scorer(torch.rand(5, 64)).shape
    torch.Size([5])
    """
    if not isinstance(model, Autoencoder):
        raise TypeError(f"model must be an AE, RAE, VAE or RVAE, got {type(model).__name__}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if precision == "bf16" and not HAS_BF16_PRODUCTS:
        raise ValueError(
            "precision must be 'fp32' or 'auto' here: bf16 products need the native module (see rvae-fast doctor) "
            "and a CPU with AVX512_BF16 or AMX"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm1d) and module.running_mean is None:
            raise ValueError(f"model: {name} has no running statistics, so that rows cannot be scored one by one")
    with alone_in_a_child():
        return Scorer(model, "fp32" if precision == "auto" else precision)


def freezable(model: nn.Module, precision: str = "auto") -> bool:
    """Whether :func:`freeze` gives a native scorer of this model, rather than a copy that runs in plain PyTorch."""
    return (
        isinstance(model, Autoencoder)
        and _HAS_KERNELS
        and covers(model)
        and (precision != "bf16" or HAS_BF16_PRODUCTS)
        and not any(isinstance(m, nn.BatchNorm1d) and m.running_mean is None for m in model.modules())
    )
