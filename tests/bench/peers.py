"""One thin SVD of one stored matrix by numpy, scipy or torch; prints what it took as JSON.

    python peers.py SHARD TENSOR numpy|scipy|torch f32|f64 THREADS

Reading and widening are not timed, nor is anything done with the result: only the call that a user would make.
"""

import json
import resource
import struct
import sys
import time

import numpy
import threadpoolctl


def matrix(path, name, dtype):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(length))[name]
        assert entry["dtype"] == "BF16", entry
        begin, end = entry["data_offsets"]
        file.seek(8 + length + begin)
        stored = numpy.frombuffer(file.read(end - begin), dtype=numpy.uint16)
    wide = (stored.astype(numpy.uint32) << 16).view(numpy.float32).reshape(entry["shape"])
    return wide.astype({"f32": numpy.float32, "f64": numpy.float64}[dtype])


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main():
    path, name, library, dtype, threads = sys.argv[1:]
    w = matrix(path, name, dtype)
    if library == "torch":
        import torch

        torch.set_num_threads(int(threads))
        version, tensor = torch.__version__, torch.from_numpy(w)

        def decompose():
            return torch.linalg.svd(tensor, full_matrices=False)
    elif library == "scipy":
        import scipy.linalg  # its BLAS is loaded now, or the limit on threads would not reach it

        version = scipy.__version__

        def decompose():
            return scipy.linalg.svd(w, full_matrices=False, lapack_driver="gesdd", check_finite=False)
    else:
        version = numpy.__version__

        def decompose():
            return numpy.linalg.svd(w, full_matrices=False)

    with threadpoolctl.threadpool_limits(int(threads)):
        pools = threadpoolctl.threadpool_info()
        before, start = cpu_seconds(), time.perf_counter()
        decompose()
        took = {"cpu_s": cpu_seconds() - before, "wall_s": time.perf_counter() - start}
    words = lambda pool: " ".join(str(pool[key]) for key in ("internal_api", "version", "architecture") if pool.get(key))
    json.dump(
        {
            "took": took,
            "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "version": version,
            "kernels": sorted({words(pool) for pool in pools}),
        },
        sys.stdout,
    )


main()
