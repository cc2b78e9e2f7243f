"""Train the demo model from nothing on SQuAD, in this project's own prompt form, in half an hour on a CPU.

    python tools/train_demo_model.py --squad PATH/train-v1.1.json.xz --out DIR [--minutes 30]

Writes DIR/fp16 (a Hugging Face Llama checkpoint), DIR/exl2 (the same through our converter) and DIR/checkpoint.pt, from
which a second call with the same arguments goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.demo_model.command import main

if __name__ == "__main__":
    main()
