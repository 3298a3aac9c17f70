"""`sae-bias play`: try features by hand, in a page of this machine."""

from typing import Annotated

from sae_bias.cli.context import Run, command


@command(
    "play",
    "sae-bias play organism:planted organism:planted/constructed#0",
    takes=("model", "device", "device_map", "dtype", "pairs"),
)
def play(
    run: Run, features: list[str], port: Annotated[int, {"min": 0, "max": 65535}] = 0, open: bool = True
) -> None:
    """Try features in a local page.

    Type a text and see its tokens colored by what a feature does there; move a strength and watch the unsteered and the steered continuation
    grow side by side; measure a quick probe and the cost in KL. The page answers on 127.0.0.1 only and loads nothing from elsewhere. Ctrl-C
    ends it. Needs the extra `play`.

    Args:
        FEATURE…: Features: RELEASE/SAE_ID#INDEX or FOLDER#INDEX.
        --port: Port on 127.0.0.1; 0 takes a free one.
        --open/--no-open: Open the page in the default browser.
    """
    import socket
    import webbrowser

    from sae_bias.integrations.playground import HOST, Playground, make_app

    ground = Playground(run.load(run.given["model"]), features, run.pairs)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((HOST, port))
    listener.listen()
    port = listener.getsockname()[1]
    app = make_app(ground, port)
    import uvicorn

    print(f"http://{HOST}:{port}  (Ctrl-C ends it)", flush=True, file=run.stdout)
    if open:
        webbrowser.open(f"http://{HOST}:{port}")
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])
