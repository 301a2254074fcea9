"""The published command of Bokeh Diffusion: `python inference_flux.py --prompt "..." --bokeh_target 15.0`.

The same as `bokehflux generate` with the published number of steps, 30. Without --model it runs the bundled
model; the published weights are --model path/to/FLUX.1-dev --adapter path/to/BokehDiffusion.
"""

from __future__ import annotations

import sys

from bokehflux.app.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", "--num-inference-steps", "30", *sys.argv[1:]]))
