"""Widths and ranks of all experts under one budget: a Lagrangian over (width, ranks), then a greedy fill."""

from dataclasses import dataclass

import torch

from fit import Choice, curves, shared_curves

NAMES = ("w1", "w3", "w2")


def cost_of_ranks(rows, cols):
    """Parameters at every rank, pivoted, up to the short side; dense where that is not less."""
    r = torch.arange(min(rows, cols) + 1, dtype=torch.float64)
    return (r * (rows + cols - r)).clamp(max=rows * cols)


class Curves:
    """One expert: the error of every width, and at some widths of every rank."""

    def __init__(self, expert, channels, moments, widths, b, tokens, base=None, spectra="exact"):
        f, self.hidden = len(channels.order), moments.x.shape[0]
        self.widths = widths
        self.width_error = channels.errors / tokens
        self.ranks = {}
        if widths is None:
            self.every = torch.arange(1, f + 1)
            return
        if spectra == "shared":
            self.ranks = shared_curves(expert, channels, moments, widths, b, tokens)
            return
        for k in widths:
            self.ranks[k] = curves(expert, channels, moments, k, b, tokens, base)

    def table(self, s):
        """Costs and weighted errors: for a width its own error, and per matrix those of the ranks, dense last."""
        found = []
        for k, errors in self.ranks.items():
            parts = []
            for name, e in zip(NAMES, errors):
                c = cost_of_ranks(k, self.hidden)
                inside = (c < k * self.hidden) & (torch.arange(len(c)) > 0)
                ranks = torch.where(inside)[0].tolist() + [0]
                parts.append((ranks, torch.cat([c[inside], c.new_tensor([k * self.hidden])]),
                              torch.cat([e[: len(c)][inside] * s[name], e.new_zeros(1)])))
            found.append((k, self.width_error[k].item() * s["width"], parts))
        return found

    def best(self, table, price):
        """The cheapest choice at a price per parameter: (choice, cost, error)."""
        if self.widths is None:
            return self.best_width(table, price)
        top = None
        for k, error, parts in table:
            ranks, cost = [], 0.0
            for r, c, e in parts:
                i = int((e + price * c).argmin())
                ranks.append(r[i])
                cost, error = cost + c[i].item(), error + e[i].item()
            if top is None or error + price * cost < top[2] + price * top[1]:
                top = (Choice(k, tuple(ranks)), cost, error)
        return top

    def best_width(self, s, price):
        e = self.width_error[1:] * s["width"]
        i = int((e + price * 3 * self.hidden * self.every).argmin())
        return Choice(i + 1, (0, 0, 0)), 3.0 * self.hidden * (i + 1), e[i].item()


@dataclass
class Plan:
    """Choices by layer and expert; weighted errors by layer and in all; parameters; what no plan falls below."""

    choices: list
    layers: list
    cost: float
    error: float
    bound: float


def plan(all_curves, sensitivities, budget):
    """With at most `budget` parameters."""
    keys = [(l, e) for l, row in enumerate(all_curves) for e in range(len(row))]
    of = lambda key: all_curves[key[0]][key[1]]
    tables = {k: of(k).table(sensitivities[k[0]]) if of(k).widths is not None else sensitivities[k[0]] for k in keys}

    def at(price):
        found = {k: of(k).best(tables[k], price) for k in keys}
        return found, sum(f[1] for f in found.values()), sum(f[2] for f in found.values())

    low, high = 1e-20, 1e3
    for _ in range(60):
        price = (low * high) ** 0.5
        _, cost, _ = at(price)
        low, high = (price, high) if cost > budget else (low, price)
    found, cost, error = at(high)
    bound = error + high * (cost - budget)
    # What is left is spent expert by expert, at the price at which the last expert still fits.
    looser, _, _ = at(low)
    for k in sorted(keys, key=lambda k: -(found[k][2] - looser[k][2]) / max(looser[k][1] - found[k][1], 1e-9)):
        if looser[k][1] > found[k][1] and cost + looser[k][1] - found[k][1] <= budget:
            cost += looser[k][1] - found[k][1]
            found[k] = looser[k]
    rows = [[found[l, e] for e in range(len(row))] for l, row in enumerate(all_curves)]
    layers = [sum(f[2] for f in row) for row in rows]
    return Plan([[f[0] for f in row] for row in rows], layers, cost, sum(layers), bound)
