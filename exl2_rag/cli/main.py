"""The `exl2-rag` program: gathers the commands. Heavy imports happen inside the commands, so `--help` is quick."""

from __future__ import annotations

import typer

from exl2_rag.cli import (
    ask,
    bench,
    bench_engine,
    cache,
    chat,
    convert,
    demo,
    evaluate,
    generate,
    index,
    inspect,
    kernels,
    pull,
)

app = typer.Typer(
    name="exl2-rag",
    help="Ask your documents, or any EXL2 model, on your own machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("index")(index.index)
app.command("ask")(ask.ask)
app.command("chat")(chat.chat)
app.command("generate")(generate.generate)
app.command("convert")(convert.convert)
app.command("inspect")(inspect.inspect)
app.command("pull")(pull.pull)
bench_app = typer.Typer(rich_markup_mode="rich")
bench_app.callback(invoke_without_command=True)(bench.bench)
bench_app.command("engine")(bench_engine.engine)
app.add_typer(bench_app, name="bench")
app.command("demo")(demo.demo)
app.add_typer(evaluate.app, name="eval")
app.add_typer(cache.app, name="cache")
app.add_typer(kernels.app, name="kernels")


if __name__ == "__main__":
    app()
