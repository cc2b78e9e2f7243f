"""LoRA adapters as PEFT writes them.

Read and checked in `config` and `adapter`, kept by name in `shelf`, laid out for a step in `step`; what a request asks
for stands in `choice`, what is computed in `layers/lora.py`.
"""
