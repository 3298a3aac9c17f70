"""`sae-bias play`: try features by hand, in a page of this machine."""

from typing import Annotated

import typer

from sae_bias.cli.options import Device, Dtype, ModelName, Pairs, example

Features = Annotated[
    list[str],
    typer.Argument(
        metavar="FEATURE…", help="Features: RELEASE/SAE_ID#INDEX or FOLDER#INDEX.", show_default=False
    ),
]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")]
Open = Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the default browser.")]


def register(app: typer.Typer) -> None:
    app.command("play", epilog=example("sae-bias play organism:planted organism:planted/constructed#0"))(play)


def play(
    model: ModelName,
    features: Features,
    pairs: Pairs = None,
    port: Port = 0,
    open_page: Open = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Try features in a local page.

    Type a text and see its tokens colored by what a feature does there; move a strength and watch the unsteered and the steered continuation
    grow side by side; measure a quick probe and the cost in KL. The page answers on 127.0.0.1 only and loads nothing from elsewhere. Ctrl-C
    ends it. Needs the extra `play`.
    """
    import socket
    import webbrowser

    from sae_bias.integrations.playground import HOST, Playground, make_app
    from sae_bias.models.load import load_model
    from sae_bias.prompts.load import load_pairs

    ground = Playground(load_model(model, device=device, dtype=dtype), features, load_pairs(pairs))
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((HOST, port))
    listener.listen()
    port = listener.getsockname()[1]
    app = make_app(ground, port)
    import uvicorn

    print(f"http://{HOST}:{port}  (Ctrl-C ends it)", flush=True)
    if open_page:
        webbrowser.open(f"http://{HOST}:{port}")
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])
