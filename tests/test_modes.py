"""A model in eval mode for a while, also where several threads want that."""

from __future__ import annotations

import threading

from rvae_fast._modes import in_eval
from rvae_fast.models import RVAE


def test_threads_that_score_a_model_in_training_leave_it_there():
    """One that comes while another is in there finds the eval mode that this has set, and must not restore that."""
    net, inside, out = RVAE(12, 3, n_layers=4).train(), threading.Event(), threading.Event()
    net.encoder[0].eval()
    modes = [module.training for module in net.modules()]

    def first():
        with in_eval(net):
            inside.set()
            out.wait(5)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(5)
    with in_eval(net):
        out.set()
        thread.join()
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == modes
    with in_eval(net):
        assert not net.training
    assert [module.training for module in net.modules()] == modes
