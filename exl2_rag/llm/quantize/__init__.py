"""Makes EXL2 models: calibrate, measure, choose layouts, quantise, write. Knows no documents and no engine."""

from exl2_rag.llm.quantize.convert import Conversion, convert
from exl2_rag.llm.quantize.convert_rtn import ConversionReport, convert_rtn
from exl2_rag.llm.quantize.options import ConversionOptions
from exl2_rag.llm.quantize.rtn import QuantisationPlan, plan_for_bits, quantize_linear_rtn

__all__ = [
    "Conversion",
    "ConversionOptions",
    "ConversionReport",
    "QuantisationPlan",
    "convert",
    "convert_rtn",
    "plan_for_bits",
    "quantize_linear_rtn",
]
