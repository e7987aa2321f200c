"""Which structures to keep of an expert: channels (widths), ranks, or both, by measured divergence.

    python docs/research/widths MODEL --calibrate TEXT --evaluate TEXT ... --row structures=rank+width,propagate=layers

Each `--row` is one method: settings as key=value, separated by commas. Decision 0015 and docs/research/widths.md say what was found.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from fit import Channels, Choice, Inputs, half_rank, narrow  # noqa: E402
from model import Expert, Mixtral, windows  # noqa: E402
from moments import collect, of_inputs, product, shrinkage  # noqa: E402
from planner import Curves, plan  # noqa: E402

KL_LEAST = 1e-7
GROUPS = ("width", "w1", "w3", "w2")


@dataclass(frozen=True)
class Settings:
    """One row of the table."""

    structures: str = "rank+width"
    grid: int = 16
    """Widths at which ranks are considered."""
    ridge: float = 0.03
    """Of the activations' second moment, in mean diagonals."""
    noise: float = 0.0
    """Share of noise in the inputs from which the activations' second moment is made."""
    cap: float = 0.0
    """Bound of a token's weight in medians; 0: none."""
    shrinkage: float = 0.1
    order: str = "obs"
    propagate: str = "layers"
    refit: str = "full"
    sensitivity: str = "half"
    """half: KL at half the parameters; iterated: then twice more by layer, at the sizes that the plan gives it."""
    width_factor: float = 1.0
    """Multiplies the sensitivity of widths."""
    spectra: str = "exact"
    """shared: errors of ranks at all widths from one eigenbasis of the full width."""
    base: int = 0
    """1: a shared base in every layer that minimises the calibrated errors; 2: the mean of the experts' matrices."""
    vocabulary: float = 0.0
    """Share of calibration windows that are replaced by shuffled tokens of the vocabulary."""
    rare: int = 0
    """Whether tokens of the vocabulary are drawn with a probability of 1 / (1 + their number in the text)."""
    mixed: float = 0.0
    """Share of tokens in the calibration windows that are replaced by random tokens of the vocabulary."""
    strange: int = 0
    """Whether sensitivities are measured on such windows, too."""

    def text(self):
        """What second moments depend on."""
        return self.noise, self.cap, self.vocabulary, self.rare, self.mixed

    @classmethod
    def parse(cls, text):
        kinds = {f.name: type(f.default) for f in fields(cls)}
        pairs = [p.split("=") for p in text.split(",") if p]
        return cls(**{k: kinds[k](v) for k, v in pairs})


class Study:
    """A model, its calibration windows and what was measured on them."""

    def __init__(self, model, text, sensitivity_windows=32):
        self.model, self.text, self.few, self.cache = model, text, sensitivity_windows, {}

    def calibrate(self, s):
        """The calibration windows [windows, T]."""
        ids, vocabulary = self.text, self.model.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        if s.vocabulary:
            n, t = round(s.vocabulary * len(ids)), ids.shape[1]
            rounds = [torch.randperm(vocabulary, generator=generator) for _ in range(n * t // vocabulary + 1)]
            strange = torch.cat(rounds)[: n * t].view(n, t)
            if s.rare:
                chances = 1 / (1.0 + torch.bincount(ids.flatten(), minlength=vocabulary))
                strange = torch.multinomial(chances, n * t, replacement=True, generator=generator).view(n, t)
            kept = ids[[i * len(ids) // (len(ids) - n) for i in range(len(ids) - n)]]
            ids = torch.cat([kept, strange])
        if s.mixed:
            where = torch.rand(ids.shape, generator=generator) < s.mixed
            ids = torch.where(where, torch.randint(vocabulary, ids.shape, generator=generator), ids)
        return ids

    def own(self, s):
        """Hidden states before every layer and log-probabilities of the original, on the windows of the sensitivities."""

        def make():
            ids = self.calibrate(s) if s.strange else self.text
            h = self.model.embed(ids[[i * len(ids) // self.few for i in range(min(len(ids), self.few))]])
            states = []
            for layer in range(len(self.model.layers)):
                states.append(h)
                h = self.model.block(layer, h, self.model.experts[layer])
            return states, torch.log_softmax(self.model.logits(h), -1)

        return self.cached(("own", s.text() if s.strange else None), make)

    def cached(self, key, make):
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def kl(self, s, layer, experts):
        """Divergence with other experts from a layer on."""
        states, log_p = self.own(s)
        h = self.model.run(states[layer], experts, layer)
        log_q = torch.log_softmax(self.model.logits(h), -1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).double().mean().item()

    def moments(self, s):
        return self.cached(("moments", *s.text()), lambda: collect(self.model, self.calibrate(s), s.noise, s.cap))

    def channels(self, s):
        plain = self.moments(s)[0]
        make = lambda: [
            [Channels(x.w2, m.h, s.ridge, s.order) for x, m in zip(*rows)] for rows in zip(self.model.experts, plain)
        ]
        return self.cached(("channels", *s.text(), s.ridge, s.order), make)

    def norms(self, s):
        plain = self.moments(s)[0]
        make = lambda: [[Inputs(x, m, s.shrinkage) for x, m in zip(*rows)] for rows in zip(self.model.experts, plain)]
        return self.cached(("norms", *s.text(), s.shrinkage), make)

    def bases(self, s):
        """Per layer a matrix for w1, w3, w2: the one that minimises Σ ‖(W_e − B) C_e^½‖², or the mean."""
        if not s.base:
            return [None] * len(self.model.experts)
        plain, channels = self.moments(s)[0], self.channels(s)

        def make():
            found = []
            for experts, ms, cs in zip(self.model.experts, plain, channels):
                eye = torch.eye(ms[0].x.shape[0], dtype=torch.float64)
                xs = [m.x + s.shrinkage * m.x.diagonal().mean() * eye for m in ms]
                least = lambda ws, c: torch.linalg.solve(sum(c), sum(w.double() @ m for w, m in zip(ws, c)).T).T
                hs = [c.c for c in cs]
                if s.base == 2:
                    found.append(tuple(torch.stack(ws).double().mean(0) for ws in zip(*((e.w1, e.w3, e.w2) for e in experts))))
                    continue
                found.append((least([e.w1 for e in experts], xs), least([e.w3 for e in experts], xs),
                              least([e.w2 for e in experts], hs)))
            return found

        return self.cached(("bases", s.base, *s.text(), s.ridge, s.order, s.shrinkage), make)

    def curves(self, s):
        plain, tokens = self.moments(s)
        channels, bases = self.channels(s), self.bases(s)
        f = self.model.config.intermediate_size
        widths = None if s.structures == "width" else [f]
        if s.structures == "rank+width":
            widths = sorted({max(1, f * i // s.grid) for i in range(1, s.grid + 1)})
        make = lambda: [
            [Curves(x, c, m, widths, s.shrinkage, tokens, base, s.spectra) for x, c, m in zip(experts, cs, ms)]
            for experts, cs, ms, base in zip(self.model.experts, channels, plain, bases)
        ]
        key = ("curves", str(widths), *s.text(), s.ridge, s.order, s.shrinkage, s.base, s.spectra)
        return self.cached(key, make)

    def made(self, s, layer, e, choice):
        m = self.moments(s)[0][layer][e]
        few = shrinkage(s.shrinkage, m.tokens, m.x.shape[0])
        return narrow(self.model.experts[layer][e], self.channels(s)[layer][e], choice, self.norms(s)[layer][e], s.shrinkage, few,
                      base=self.bases(s)[layer])

    def sensitivities(self, s):
        """KL per unit of error, by layer and structure, each alone at half its size."""
        f, hidden = self.model.config.intermediate_size, self.model.config.hidden_size
        r = half_rank(f, hidden)
        alone = {"width": Choice(f // 2, (0, 0, 0)), "w1": Choice(f, (r, 0, 0)), "w3": Choice(f, (0, r, 0)), "w2": Choice(f, (0, 0, r))}
        tokens = self.moments(s)[1]
        groups = ("width",) if s.structures == "width" else GROUPS if "width" in s.structures else GROUPS[1:]

        def measure(layer, group):
            swapped = list(self.model.experts)
            swapped[layer] = [self.made(s, layer, e, alone[group]) for e in range(len(swapped[layer]))]
            if group == "width":
                error = sum(c.errors[f // 2].item() for c in self.channels(s)[layer]) / tokens
            else:
                error = sum(c.ranks[f][GROUPS.index(group) - 1][r].item() for c in self.curves(s)[layer])
            return max(self.kl(s, layer, swapped), KL_LEAST) / max(error, 1e-300)

        key = ("sensitivity", s.strange, *s.text(), s.ridge, s.order, s.shrinkage, s.base)
        by_group = lambda layer, g: self.cached((*key, layer, g), lambda: measure(layer, g))
        found = [{g: by_group(layer, g) for g in groups} for layer in range(len(self.model.layers))]
        return [{g: v * (s.width_factor if g == "width" else 1) for g, v in {"width": 0.0, **row}.items()} for row in found]

    def plan(self, s, budget):
        curves, sensitivities = self.curves(s), self.sensitivities(s)
        if s.base:
            budget -= 3 * self.model.config.intermediate_size * self.model.config.hidden_size * len(curves)
        found = plan(curves, sensitivities, budget)
        for _ in range(2 if s.sensitivity == "iterated" else 0):
            for layer, row in enumerate(found.choices):
                swapped = list(self.model.experts)
                swapped[layer] = [self.made(s, layer, e, choice) for e, choice in enumerate(row)]
                factor = max(self.kl(s, layer, swapped), KL_LEAST) / max(found.layers[layer], 1e-300)
                sensitivities[layer] = {g: v * factor for g, v in sensitivities[layer].items()}
            found = plan(curves, sensitivities, budget)
        return found

    def compressed(self, s, choices):
        """The experts of a plan, layer by layer fitted to the inputs that the compressed layers give."""
        model = self.model
        if s.propagate == "none":
            return [[self.made(s, l, e, c) for e, c in enumerate(row)] for l, row in enumerate(choices)]
        calibrate = self.calibrate(s)
        own = [model.embed(part) for part in calibrate.split(16)]
        other = [h.clone() for h in own] if s.propagate == "layers" else own
        made = []
        for layer, row in enumerate(choices):
            own = [model.attention(layer, h) for h in own]
            other = [model.attention(layer, h) for h in other] if s.propagate == "layers" else own
            x = torch.cat([model.moe_input(layer, h) for h in own])
            changed = torch.cat([model.moe_input(layer, h) for h in other]) if s.propagate == "layers" else x
            routing = model.route(layer, changed)
            made.append([self.fitted(s, layer, e, c, x, changed, *routing[e]) for e, c in enumerate(row)])
            y = model.moe(x, model.route(layer, x), model.experts[layer]).split(16 * calibrate.shape[1])
            own = [h + part.view_as(h) for h, part in zip(own, y)]
            if s.propagate == "layers":
                y = model.moe(changed, routing, made[-1]).split(16 * calibrate.shape[1])
                other = [h + part.view_as(h) for h, part in zip(other, y)]
        return made

    def fitted(self, s, layer, e, choice, x, changed, tokens, g):
        expert, f = self.model.experts[layer][e], self.model.config.intermediate_size
        if len(tokens) == 0 or choice == Choice(f, (0, 0, 0)) and s.refit != "full":
            return self.made(s, layer, e, choice)
        x, changed, g2 = x[tokens], changed[tokens], g[:, None] ** 2
        norm = self.norms(s)[layer][e]
        if s.propagate == "layers":
            norm = Inputs(expert, of_inputs(expert, x, g, changed, s.cap, activations=False), s.shrinkage)
        y = expert(x) * g2

        def outputs(w1, w3):
            z = Expert(w1, w3, expert.w2).activations(changed)
            return product(z * g2, z), product(y, z)

        few = shrinkage(s.shrinkage, float(len(tokens)), x.shape[1])
        return narrow(expert, self.channels(s)[layer][e], choice, norm, s.shrinkage, few, outputs, s.refit, self.bases(s)[layer])


class Evaluation:
    """The original's logits on a text; perplexity and divergence of other experts, with errors over windows."""

    def __init__(self, model, ids):
        self.model, self.parts = model, ids.split(16)
        self.original = [torch.log_softmax(self.logits(part, model.experts), -1).half() for part in self.parts]
        self.loss = torch.cat([self.losses(p, part) for p, part in zip(self.original, self.parts)])

    def logits(self, part, experts):
        return self.model.logits(self.model.run(self.model.embed(part), experts))

    @staticmethod
    def losses(log_p, part):
        return -log_p[:, :-1].float().gather(-1, part[:, 1:, None]).squeeze(-1).double().mean(1)

    def perplexity(self):
        return self.loss.mean().exp().item()

    def compare(self, experts):
        loss, kl = [], []
        for part, log_p in zip(self.parts, self.original):
            log_q = torch.log_softmax(self.logits(part, experts), -1)
            loss.append(self.losses(log_q, part))
            p = log_p[:, :-1].float()
            kl.append((p.exp() * (p - log_q[:, :-1])).sum(-1).double().mean(1))
        difference, kl = torch.cat(loss) - self.loss, torch.cat(kl)
        ratio = difference.mean().exp().item()
        return 100 * (ratio - 1), 100 * ratio * difference.std().item() / math.sqrt(len(difference)), 1000 * kl.mean().item()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--guard", type=Path, help="a second calibration text")
    parser.add_argument("--guard-share", type=float, default=0.25, help="its share of the calibration tokens")
    parser.add_argument("--evaluate", type=Path, nargs="+", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--budgets", type=float, nargs="+", default=[22.2, 50], help="percent of the expert parameters")
    parser.add_argument("--bos", choices=["auto", "never"], default="never")
    parser.add_argument("--row", action="append", default=[], help="settings of a method")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main():
    a = arguments()
    torch.set_grad_enabled(False)
    torch.set_num_threads(a.threads)
    bos, model = a.bos == "auto", Mixtral(a.model)
    guarded = int(a.calibration_tokens * a.guard_share) if a.guard else 0
    calibrate = windows(a.model, a.calibrate, a.calibration_tokens - guarded, bos=bos, spread=True)
    if a.guard:
        calibrate = torch.cat([calibrate, windows(a.model, a.guard, guarded, bos=bos, spread=True)])
    texts = {t.stem: Evaluation(model, windows(a.model, t, a.tokens, bos=bos)) for t in a.evaluate}
    print(f"{a.model.name}, {calibrate.numel()} calibration tokens, perplexity", {n: round(t.perplexity(), 3) for n, t in texts.items()}, flush=True)
    study = Study(model, calibrate)
    c = model.config
    full = 3 * c.hidden_size * c.intermediate_size * c.num_local_experts * c.num_hidden_layers
    for text in a.row:
        s = Settings.parse(text)
        for budget in a.budgets:
            start = time.process_time()
            p = study.plan(s, math.floor(full * (1 - budget / 100)))
            choices, error, bound = p.choices, p.error, p.bound
            experts = study.compressed(s, choices)
            found = {n: t.compare(experts) for n, t in texts.items()}
            flat = [x for row in choices for x in row]
            cut = sum(x.width for x in flat) / len(flat) / c.intermediate_size
            cells = " / ".join(f"{d:+.2f} ±{e:.2f}" for d, e, _ in found.values())
            kls = " / ".join(f"{k:.2f}" for _, _, k in found.values())
            factored = [round(sum(x.ranks[i] > 0 for x in flat) / len(flat), 2) for i in range(3)]
            by_layer = [round(sum(x.width for x in row) / len(row) / c.intermediate_size, 2) for row in choices]
            print(f"{text:50} -{budget} %: {cells} %, KL {kls}; planned {error:.4f} (gap {error / max(bound, 1e-30) - 1:.1%}), width {cut:.2f} {by_layer}, factored {factored}, "
                  f"{time.process_time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
