"""Makes EXL2 models: scales of a group, rounding of a matrix, conversion of a model directory."""

from exl2_rag.llm.quantize.convert_rtn import ConversionReport, convert_rtn
from exl2_rag.llm.quantize.rtn import QuantisationPlan, plan_for_bits, quantize_linear_rtn

__all__ = ["ConversionReport", "QuantisationPlan", "convert_rtn", "plan_for_bits", "quantize_linear_rtn"]
