"""Narrowed and factored experts, and the error of every width and rank, in the norms of `moments`."""

from dataclasses import dataclass

import torch

from model import Expert
from moments import shrinkage, towards_identity, with_ridge


@dataclass(frozen=True)
class Choice:
    """What becomes of an expert: the channels that stay (the first `width` of its order) and the ranks of the narrowed
    w1, w3 and w2; 0 stands for dense."""

    width: int
    ranks: tuple


def half_rank(m, n):
    """The largest rank at which a pivoted matrix has at most half its parameters."""
    return max(r for r in range(1, min(m, n) + 1) if r == 1 or 2 * r * (m + n - r) <= m * n)


def tails(values):
    """Σ of all values from the r-th on, for r = 0 … n, of falling values."""
    values = values.clamp(min=0)
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])


def by_deletion(w2, c, stages):
    """Optimal brain surgeon: ‖W2[:, i]‖² / [C⁻¹]_ii is what the error grows by if i alone goes. In several stages, each
    with w2 refitted to what is left, down to a sixteenth."""
    left, gone = torch.arange(len(c)), []
    for stage in range(stages):
        w = w2[:, left] if stage == 0 else torch.linalg.solve(c[left][:, left], c[left] @ w2.T).T
        score = (w**2).sum(0) / torch.linalg.inv(c[left][:, left]).diagonal()
        falling = score.argsort(descending=True, stable=True)
        keep = 0 if stage == stages - 1 else round(len(c) * 16 ** (-(stage + 1) / stages))
        gone.insert(0, left[falling[keep:]])
        left = left[falling[:keep]]
    return torch.cat(gone)


def by_energy(w2, c, _):
    return ((w2**2).sum(0) * c.diagonal()).argsort(descending=True, stable=True)


def by_gain(w2, c, _):
    """Forward: always the channel with the largest gain ‖W2 R e_i‖² / R_ii, R the Schur complement."""
    r, g, order = c.clone(), w2 @ c, []
    left = torch.ones(len(c), dtype=torch.bool)
    for _ in range(len(c)):
        gain = (g * g).sum(0) / r.diagonal().clamp(min=1e-30)
        gain[~left] = -1
        j = int(gain.argmax())
        order.append(j)
        left[j] = False
        root = r[j, j].clamp(min=1e-30).sqrt()
        a, b = r[:, j] / root, g[:, j] / root
        r -= torch.outer(a, a)
        g -= torch.outer(b, b)
    return torch.tensor(order)


ORDERS = {"obs": by_deletion, "energy": by_energy, "gain": by_gain}


class Channels:
    """The order of an expert's channels, the error of every width, and the refit of w2."""

    def __init__(self, w2, second, ridge, order="obs"):
        self.w2, self.ridge = w2.double(), ridge
        self.c = with_ridge(second, ridge)
        self.order = ORDERS[order.rstrip("0123456789")](self.w2, self.c, int(order.lstrip("abcdefghijklmnopqrstuvwxyz") or 1))
        p = self.c[self.order][:, self.order]
        self.columns = self.w2[:, self.order] @ torch.linalg.cholesky(p)  # W2 L
        self.errors = tails((self.columns**2).sum(0))

    def kept(self, width):
        return self.order[:width]

    def refit(self, width):
        """W2 C[:, S] C[S, S]⁻¹ [H, k]"""
        s = self.kept(width)
        if width == len(self.order):
            return self.w2[:, s]
        return torch.linalg.solve(self.c[s][:, s], self.c[s] @ self.w2.T).T

    def outputs(self, width):
        """Second moment of the refitted outputs [H, H]."""
        part = self.columns[:, :width]
        return part @ part.T


class Inputs:
    """The norm of w1 and w3: root of the shrunk second moment of the inputs, its inverse, the map from x̂ to x."""

    def __init__(self, expert, m, b):
        hidden = m.x.shape[0]
        b = shrinkage(b, m.tokens, hidden)
        energies = (expert.w2.double() ** 2).sum(0)
        self.raw = m.gate, m.up
        self.total = ((m.gate + m.up) @ energies).clamp(min=1e-300)
        c = towards_identity(m.x, b)
        values, vectors = torch.linalg.eigh(c)
        values = values.clamp(min=values.max() * 1e-14)
        self.root = (vectors * values.sqrt()) @ vectors.T
        self.inverse = (vectors / values.sqrt()) @ vectors.T
        mean = m.x.diagonal().mean()
        cross = (1 - b) * m.cross + b * mean * torch.eye(hidden, dtype=torch.float64) if mean > 0 else c
        self.map = torch.linalg.solve(c, cross.T).T

    def rows(self, which, s, w2):
        """Row weights of w1 (0) or w3 (1) for the channels S with the columns of w2 that they feed."""
        return self.raw[which][s] * (w2**2).sum(0) / self.total

    def spectrum(self, w, rows):
        a = w.double() @ self.map @ self.root
        return torch.linalg.eigvalsh(a.T @ (a * rows[:, None])).flip(0)

    def factored(self, w, rows, rank):
        a = w.double() @ self.map @ self.root
        v = torch.linalg.eigh(a.T @ (a * rows[:, None]))[1].flip(1)[:, :rank]
        return a @ v @ v.T @ self.inverse


def shrunk_outputs(o, w2, b):
    gram = w2 @ w2.T
    scale = o.trace() / gram.trace().clamp(min=1e-300)
    return (1 - b) * o + b * scale * gram if o.trace() > 0 else gram


def curves(expert, channels, m, width, b, tokens, base=None):
    """Errors at every rank of the narrowed w1, w3, w2, per token of the text."""
    norm, s = Inputs(expert, m, b), channels.kept(width)
    w2 = channels.refit(width)
    w1, w3, target = expert.w1[s].double(), expert.w3[s].double(), w2
    o = channels.outputs(width)
    if base is not None:
        w1, w3, target = w1 - base[0][s], w3 - base[1][s], w2 - base[2][:, s]
        o = target @ channels.c[s][:, s] @ target.T
    o = shrunk_outputs(o, target, shrinkage(b, m.tokens, m.x.shape[0]))
    found = [norm.spectrum(w, norm.rows(i, s, w2)) for i, w in enumerate((w1, w3))]
    found.append(torch.linalg.eigvalsh(o).flip(0))
    return [tails(v[: min(width, len(v))]) / tokens for v in found]


def shared_curves(expert, channels, m, widths, b, tokens):
    """The same at all widths from the eigenvectors of the full width alone: an upper bound, since the best subspace of a
    narrowed matrix is another one. The row weights are those of the original w2."""
    norm, w2, order = Inputs(expert, m, b), channels.w2, channels.order
    energies = []  # [F, H]: of every channel along every eigenvector, falling
    for i, w in enumerate((expert.w1, expert.w3)):
        rows = norm.rows(i, order, w2[:, order])
        a = w[order].double() @ norm.map @ norm.root
        v = torch.linalg.eigh(a.T @ (a * rows[:, None]))[1].flip(1)
        energies.append((a @ v) ** 2 * rows[:, None])
    o = shrunk_outputs(channels.outputs(len(order)), w2, shrinkage(b, m.tokens, m.x.shape[0]))
    u = torch.linalg.eigh(o)[1].flip(1)
    energies.append((u.T @ channels.columns).T ** 2)
    found = {}
    for k in widths:
        found[k] = [tails(e[:k].sum(0)) / tokens for e in energies]
    return found


def narrow(expert, channels, choice, norm, b, few, outputs=None, refit="full", base=None):
    """An expert as chosen. `outputs(w1, w3)` gives Σ g² z zᵀ [k, k] and Σ g² y zᵀ [H, k] of the compressed activations;
    without it w2 is fitted to the original's."""
    s, (r1, r3, r2) = channels.kept(choice.width), choice.ranks
    w2 = channels.refit(choice.width)
    made = []
    for i, (w, r) in enumerate(((expert.w1[s], r1), (expert.w3[s], r3))):
        shared = base[i][s] if base is not None and r else 0.0
        rows = norm.rows(i, s, w2)
        made.append((norm.factored(w.double() - shared, rows, r) + shared if r else w.double()).float())
    c = channels.c[s][:, s]
    changed = outputs is not None
    if changed and refit == "full":
        z, cross = outputs(*made)
        c = with_ridge(z, channels.ridge)
        w2 = torch.linalg.solve(c, (cross + w2 @ (c - z)).T).T
    elif changed and refit == "outputs" and r2:
        z, cross = outputs(*made)
        o = w2 @ z @ w2.T
        gram = w2 @ w2.T * (few * o.trace() / (w2 * w2).sum())
        w2 = torch.linalg.solve((1 - few) * o + gram, ((1 - few) * cross @ w2.T + gram).T).T @ w2
        c = z
    if r2:
        shared = base[2][:, s] if base is not None else 0.0
        target = w2 - shared
        o = shrunk_outputs(target @ c @ target.T, target, few)
        u = torch.linalg.eigh(o)[1].flip(1)[:, :r2]
        w2 = u @ (u.T @ target) + shared
    return Expert(*made, w2.float())
