#!/usr/bin/env python
"""Convert the LoRA of experts between formats: see kt_hf.adapters.

python scripts/convert_moe_lora.py --input out/checkpoint-300 --output experts.pt
python scripts/convert_moe_lora.py --input adapter_model.safetensors --config adapter_config.json --output out.pt
python scripts/convert_moe_lora.py --input out/checkpoint-300 --to merged --base Qwen3-30B-A3B --output merged-model
"""

from __future__ import annotations

import argparse
import sys

from kt_hf import KTAMXError
from kt_hf.adapters import FORMATS, convert


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", required=True, help="folder or safetensors file of an adapter; its format is detected"
    )
    parser.add_argument("--config", help="the input's adapter_config.json, where it is not beside it")
    parser.add_argument("--output", required=True, help="new folder, ….pt (sglang) or fused_expert_lora.safetensors")
    parser.add_argument("--to", choices=FORMATS, help="format of the output, where its extension does not tell")
    parser.add_argument("--base", help="folder of the base model (merged; tells Mixtral's names from others')")
    args = parser.parse_args()
    try:
        print(convert(args.input, args.output, to=args.to, base=args.base, config=args.config))
    except KTAMXError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
