"""A feature may be named by its Neuronpedia page, in each spelling that people paste."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import sae_bias as sb
from sae_bias.saes import neuronpedia, releases

PAGE = "gemma-2-9b/20-gemmascope-res-16k"


@pytest.mark.parametrize(
    "name",
    [
        f"https://www.neuronpedia.org/{PAGE}/123",
        f"neuronpedia.org/{PAGE}/123",
        f"{PAGE}/123",
        f"https://neuronpedia.org/{PAGE}/123/",
    ],
)
def test_a_page_names_the_feature(name):
    ref = sb.FeatureRef.parse(name)
    assert ref.index == 123
    assert releases.sae_release(ref.sae.release).pages[ref.sae.sae_id] == PAGE


def test_an_unknown_page_is_one_plain_line():
    with pytest.raises(sb.RequestError, match="Neuronpedia page"):
        sb.FeatureRef.parse("https://www.neuronpedia.org/gpt-9/3-nothing-here/5")


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A local Neuronpedia that knows one feature, and the paths it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            known = self.path == f"/api/feature/{PAGE}/123"
            body = json.dumps({"explanations": [{"description": "mentions of AI"}]} if known else {}).encode()
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(neuronpedia, "SITE", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(neuronpedia, "is_offline", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield asked
    server.shutdown()


def test_a_page_gives_its_explanation_once(site):
    ref = sb.FeatureRef.parse(f"{PAGE}/123")
    assert neuronpedia.feature_page(ref).endswith(f"/{PAGE}/123")
    assert [neuronpedia.feature_description(ref) for _ in range(2)] == ["mentions of AI"] * 2
    assert site == [f"/api/feature/{PAGE}/123"]
    assert neuronpedia.feature_description(sb.FeatureRef.parse(f"{PAGE}/124")) is None


def test_a_list_has_the_features_with_pages_only(site):
    own = "organism:planted/constructed#0"
    found = neuronpedia.feature_list([f"{PAGE}/123", own, sb.FeatureRef.parse(f"{PAGE}/9")], describe=True)
    model, source = PAGE.split("/")
    assert found == [
        {"modelId": model, "layer": source, "index": "123", "description": "mentions of AI"},
        {"modelId": model, "layer": source, "index": "9", "description": ""},
    ]
