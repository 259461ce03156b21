"""Writes fixtures/proxies.json: the proxy that the Python library of the Hub takes for an address, by the variables.

  python3 tools/make_proxy_fixtures.py      (needs huggingface_hub 1 or 2, that is httpx or httpx2)
"""

import json
import os
from pathlib import Path

try:
    import httpx2 as httpx
except ImportError:
    import httpx

ADDRESSES = """http://example.com/ https://example.com/ http://www.example.com/ http://notexample.com/
http://example.com:8080/x http://localhost:8/ http://sub.localhost/ http://127.0.0.1:9/ http://10.1.2.3/
http://11.1.2.3/ http://[::1]:7/ http://[fd00::5]/""".split()
BOTH = {"HTTP_PROXY": "http://p:1", "https_proxy": "http://s:2"}
NO_PROXY = ["*", " * ", "example.com", ".example.com", "*.example.com", "EXAMPLE.com", "localhost", "127.0.0.1"]
NO_PROXY += ["10.0.0.0/8", "fd00::/8", "a.com, example.com", "ample.com", "example.com:8080", "example.com:443", "::1"]
NO_PROXY += ["[::1]", "http://example.com", "https://example.com", "all://example.com", "com", "example.com."]
CASES = [{}, {"HTTP_PROXY": "http://p:1"}, {"http_proxy": "p:1"}, {"http_proxy": "", "HTTP_PROXY": "http://p:1"}]
CASES += [{"HTTPS_PROXY": "http://p:1"}, {"ALL_PROXY": "http://p:1"}, {"all_proxy": "q:2", "https_proxy": "http://p:1"}]
CASES += [BOTH] + [{**BOTH, "NO_PROXY": entry} for entry in NO_PROXY]


def proxies(variables):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]
    os.environ.update(variables)
    client = httpx.Client()
    urls = [getattr(client._transport_for_url(httpx.URL(a))._pool, "_proxy_url", None) for a in ADDRESSES]
    return [url and f"{url.host.decode()}:{url.port}" for url in urls]


cases = [{"variables": variables, "proxies": proxies(variables)} for variables in CASES]
file = Path(__file__).parent / "fixtures" / "proxies.json"
lines = ",\n".join(json.dumps(case) for case in cases)
file.write_text(f'{{"addresses": {json.dumps(ADDRESSES)},\n"cases": [\n{lines}\n]}}\n')
