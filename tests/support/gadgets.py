"""Files that run a stranger's code in whoever loads them as is usual for their kind: each makes a canary."""

import base64
import bz2
import gzip
import io
import json
import lzma
import marshal
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

_seen: list[str] | None = None


def _note(event: str, args: tuple[Any, ...]) -> None:
    if _seen is not None and event in ("pickle.find_class", "exec", "subprocess.Popen"):
        if event != "exec" or getattr(args[0], "co_filename", "") == "<gadget>":
            _seen.append(f"{event} {args!r}")


sys.addaudithook(_note)


@contextmanager
def unpickled() -> Iterator[list[str]]:
    """What is looked up for a pickle, or run of what a file holds, during the block."""
    global _seen
    _seen = []
    try:
        yield _seen
    finally:
        _seen = None


class Gadget:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.canary)!r}, 'w').close()",)


def source(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()"


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name.replace("__", "/"), data)
    return buffer.getvalue()


def tarred(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def packed(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def files(canary: Path) -> dict[str, bytes]:
    """By name; the ending says what the file is, or passes for."""
    gadget = Gadget(canary)
    pickles = {protocol: pickle.dumps({"weight": gadget}, protocol) for protocol in range(6)}
    plain = pickles[2]
    saved, old, arrays, array = (io.BytesIO() for _ in range(4))
    torch.save({"weight": gadget}, saved)
    torch.save({"weight": gadget}, old, _use_new_zipfile_serialization=False)
    np.savez(arrays, weight=np.array([gadget], dtype=object))
    np.save(array, np.array([gadget], dtype=object), allow_pickle=True)
    code = marshal.dumps(compile(source(canary), "<gadget>", "exec"))
    entry = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}'
    whole = entry % (1, 4)
    apart = whole.replace(b"[0,4]", b"[400,404]")
    return {
        **{f"protocol{protocol}.bin": data for protocol, data in pickles.items()},
        "model.pt": saved.getvalue(),
        "model.ckpt": saved.getvalue(),
        "model.pth": old.getvalue(),
        "saved.safetensors": saved.getvalue(),
        "old.safetensors": old.getvalue(),
        "pickle.safetensors": plain,
        "text.safetensors": pickles[0],
        "spaces.safetensors": b" \n" + plain,
        "archive.npz": arrays.getvalue(),
        "array.npy": array.getvalue(),
        "tarred.tar": tarred(data=plain, sys_info=plain, pickle=plain),
        "zipped.zip": zipped(data__pkl=plain),
        "script.torchscript": zipped(code__x_py=source(canary).encode(), constants_pkl=plain, version=b"3\n"),
        "keras.keras": zipped(config_json=b'{"class_name": "Lambda"}', model_weights_h5=plain),
        "gz.pkl.gz": gzip.compress(plain),
        "bz2.pkl.bz2": bz2.compress(plain),
        "xz.pkl.xz": lzma.compress(plain),
        "model.gguf": b"GGUF\x03\0\0\0" + bytes(16) + plain,
        "model.h5": b"\x89HDF\r\n\x1a\n" + bytes(8) + plain,
        "model.onnx": b"\x08\x07\x12\x07pytorch" + plain,
        "model.pb": b"\x0a\x09PyFunc\x12" + plain,
        "model.msgpack": b"\x81\xa6weight\xc7" + bytes([len(plain) % 256, 42]) + plain,
        "model.joblib": plain,
        "model.pyc": b"\xa7\x0d\x0d\x0a" + bytes(12) + code,
        "model.py": source(canary).encode(),
        "model.yaml": f"!!python/object/apply:builtins.exec [{source(canary)!r}]".encode(),
        "model.so": b"\x7fELF\x02\x01\x01" + bytes(57) + plain,
        "model.sh": f"#!/bin/sh\ntouch {canary}\n".encode(),
        "config.json": json.dumps({"auto_map": {"AutoModel": "evil.Model"}, "_class_name": "Evil"}).encode(),
        # what begins almost as it should
        "header.safetensors": packed(plain),
        "braces.safetensors": packed(b"{" + plain + b"}"),
        "after.safetensors": packed(whole, bytes(4) + plain),
        "zip_after.safetensors": packed(whole, bytes(4) + zipped(data__pkl=plain)),
        "gap.safetensors": packed(apart, plain.ljust(404)),
        "object.safetensors": packed(entry.replace(b"F32", b"O") % (1, len(plain)), plain),
        "notes.safetensors": packed(b'{"__metadata__":{"__reduce__":"' + base64.b64encode(plain) + b'"}}'),
    }
