"""Content Credentials (C2PA): a signature in the file that says a model made the picture. Extra `c2pa`.

The recipe and the plain mark "AI generated" are in every picture without it; a signature can be checked.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from bokehflux.pictures.metadata import SOURCE_TYPE, encode
from bokehflux.version import __version__

Sign = Callable[[bytes, str], bytes]
"""(the bytes of a picture, its kind: "png", "jpeg" or "webp") -> the bytes with a signature inside."""
ALGORITHMS = ("es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519")


def signer(certificates: str | Path, key: str | Path, algorithm: str = "es256") -> Sign:
    """Signs with a chain of certificates (PEM, the signer's first) and its private key (PKCS #8, PEM).

    Signs a small picture at once, as a trial. Raises ValueError for files that do not serve, or without the
    package `c2pa-python`.
    """
    try:
        import c2pa
    except ImportError:
        raise ValueError("signing needs the package c2pa-python: pip install c2pa-python") from None
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown signing algorithm {algorithm!r}: expected one of {', '.join(ALGORITHMS)}")
    try:
        info = c2pa.C2paSignerInfo(
            alg=getattr(c2pa.C2paSigningAlg, algorithm.upper()),
            sign_cert=Path(certificates).read_bytes(),
            private_key=Path(key).read_bytes(),
            ta_url=None,
        )
    except (OSError, c2pa.C2paError) as error:
        raise ValueError(f"cannot sign with {certificates} and {key}: {error}") from error
    manifest = json.dumps(
        {
            "claim_generator_info": [{"name": "bokehflux", "version": __version__}],
            "assertions": [
                {
                    "label": "c2pa.actions",
                    "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE}]},
                }
            ],
        }
    )

    def sign(data: bytes, kind: str) -> bytes:
        signed = io.BytesIO()
        try:
            with c2pa.Signer.from_info(info) as with_key, c2pa.Builder(manifest) as builder:
                builder.sign(with_key, f"image/{kind}", io.BytesIO(data), signed)
        except c2pa.C2paError as error:
            raise ValueError(f"cannot sign with {certificates} and {key}: {error}") from error
        return signed.getvalue()

    sign(encode(Image.new("RGB", (16, 16)), {}), "png")
    return sign
