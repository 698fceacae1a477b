"""Where a URL in a request must not lead, in every way of writing it.

`NOT_PUBLIC` are addresses, `SPELLINGS` ways to write one of them in a URL, `DISPUTED` URLs of which parsers
disagree what their host is.
"""

NOT_PUBLIC = [
    "0.0.0.0",  # this host
    "0.1.2.3",
    "10.0.0.1",  # private
    "10.255.255.255",
    "100.64.0.1",  # carrier-grade NAT
    "100.100.100.200",  # a cloud's metadata
    "100.127.255.255",
    "127.0.0.1",  # loopback
    "127.255.255.254",
    "168.63.129.16",  # a cloud's platform services
    "169.254.0.1",  # link-local
    "169.254.169.254",  # metadata
    "169.254.170.2",
    "172.16.0.1",  # private
    "172.31.255.255",
    "192.0.0.1",  # protocol assignments
    "192.0.0.192",
    "192.0.2.1",  # documentation
    "192.31.196.1",  # AS112
    "192.52.193.1",  # AMT
    "192.88.99.1",  # 6to4 relay
    "192.168.0.1",  # private
    "192.168.255.255",
    "192.175.48.1",  # AS112
    "198.18.0.1",  # benchmarks
    "198.19.255.255",
    "198.51.100.1",  # documentation
    "203.0.113.1",
    "224.0.0.1",  # multicast
    "239.255.255.255",
    "240.0.0.1",  # reserved
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",  # IPv4-compatible
    "::a00:1",
    "::8.8.8.8",  # compatible, and public inside
    "::ffff:127.0.0.1",  # IPv4-mapped
    "::ffff:169.254.169.254",
    "::ffff:8.8.8.8",
    "::ffff:0:127.0.0.1",  # IPv4-translated
    "64:ff9b::7f00:1",  # NAT64
    "64:ff9b::808:808",
    "64:ff9b:1::a00:1",  # local NAT64
    "100::1",  # discard
    "2001::1",  # Teredo
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:1::1",  # port control
    "2001:2::1",  # benchmarks
    "2001:3::1",  # AMT
    "2001:4:112::1",  # AS112
    "2001:10::1",  # ORCHID
    "2001:20::1",
    "2001:1ff:ffff::1",
    "2001:db8::1",  # documentation
    "2002:7f00:1::1",  # 6to4 of loopback
    "2002:808:808::1",
    "2620:4f:8000::1",  # AS112
    "3fff::1",  # documentation
    "3fff:fff::1",
    "2a00:1450::5efe:7f00:1",  # ISATAP of loopback
    "2a00:1450::200:5efe:a00:1",
    "2a00:1450::5efe:169.254.169.254",
    "4000::1",  # nowhere given out
    "5f00::1",  # segment routing
    "fc00::1",  # unique local
    "fd00:ec2::254",  # metadata
    "fe80::1",  # link-local
    "fe80::1%1",
    "fec0::1",  # site-local
    "ff02::1",  # multicast
]

SPELLINGS = [
    "127.0.0.1",
    "127.0.0.1.",
    "127.1",  # short
    "127.0.1",
    "127.000.000.001",
    "2130706433",  # decimal
    "0x7f000001",  # hexadecimal
    "0x7f.0.0.1",
    "0x7f.1",
    "0X7F.0x0.0x0.0x1",
    "017700000001",  # octal
    "0177.0.0.1",
    "0177.0.0.01",
    "0177.1",
    "0",
    "0.0.0.0",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "１２７.０.０.１",  # full width
    "127。0。0。1",  # ideographic stops
    "127｡0｡0｡1",
    "①②⑦.⓪.⓪.①",  # circled
    "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ",
    "𝟏𝟐𝟕.𝟎.𝟎.𝟏",  # mathematical
    "127.0.0.1%00.example.com",
    "127.0.0.1%2e",
    "%31%32%37.0.0.1",
    "[::1]",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[::127.0.0.1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[0:0:0:0:0:ffff:127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[2002:7f00:1::]",
    "[::1%25lo]",
    "[fe80::1]",
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "[fd00:ec2::254]",
    "example.com@127.0.0.1",
    "127.0.0.1#@example.com",
    "example.com\\@127.0.0.1",
    "127.0.0.1\t",
    "127.0.0.1\r\nHost: x",
]

# `good.example` is a host that may be reached; everything else in them is not
DISPUTED = [
    "http://good.example\\@127.0.0.1/",
    "http://good.example\\.127.0.0.1/",
    "http://127.0.0.1\\@good.example/",
    "http://127.0.0.1\\\\@good.example/",
    "http:\\\\127.0.0.1\\",
    "http:/\\127.0.0.1/",
    "http:\\/127.0.0.1/",
    "\\\\127.0.0.1\\share",
    "http:127.0.0.1/",
    "http:/127.0.0.1/",
    "http:///127.0.0.1/",
    "http:////127.0.0.1/",
    "//127.0.0.1/",
    "http://127.0.0.1:80\\@good.example:80/",
    "http://good.example:80@127.0.0.1/",
    "http://good.example@127.0.0.1@good.example/",
    "http://good.example#@127.0.0.1/",
    "http://good.example?@127.0.0.1/",
    "http://127.0.0.1#@good.example/",
    "http://127.0.0.1?@good.example/",
    "http://127.0.0.1;good.example/",
    "http://127.0.0.1,good.example/",
    "http://127.0.0.1 good.example/",
    "http://127.0.0.1\tgood.example/",
    "http://127.0.0.1\n.good.example/",
    "http://127.0.0.1\r\nHost:%20good.example/",
    "http://127.0.0.1%0d%0aHost:%20good.example/",
    "http://127.0.0.1%2f.good.example/",
    "http://127.0.0.1%23.good.example/",
    "http://127.0.0.1%3f.good.example/",
    "http://127.0.0.1%40good.example/",
    "http://127.0.0.1%5cgood.example/",
    "http://good.example%2f@127.0.0.1/",
    "http://good.example%00@127.0.0.1/",
    "http://[::1]@good.example:80/",
    "http://good.example@[::1]/",
    "http://[::1].good.example/",
    "http://[::1/",
    "http://::1/",
    "http://[[::1]]/",
    "http://[v1.127.0.0.1]/",
    "http://[127.0.0.1]/",
    "http://127.0.0.1:80:80/",
    "http://127.0.0.1:/",
    "http://127.0.0.1:０80/",
    "http://127.0.0.1:+80/",
    "http://127.0.0.1:-1/",
    "http://127.0.0.1:65616/",
    " http://127.0.0.1/",
    "\thttp://127.0.0.1/",
    "\x00http://127.0.0.1/",
    "ht\ntp://127.0.0.1/",
    "HtTp://127.0.0.1/",
    "http://127.0.0.1.",
    "http://.127.0.0.1/",
    "http://127..0.0.1/",
    "http://-127.0.0.1/",
    "http://127.0.0.1\u200b/",
    "http://127\u30020.0.1/",
    "http://127.0.0.1\uff0fgood.example/",
    "http://good.example\uff03@127.0.0.1/",
    "http://good.example\uff20127.0.0.1/",
    "http://xn--127.0.0.1/",
    "url:http://127.0.0.1/",
    "http+unix://%2fvar%2frun%2fdocker.sock/containers",
    "unix:///var/run/docker.sock",
    "http://unix:/var/run/docker.sock:/x",
    "file:///etc/passwd",
    "file://127.0.0.1/etc/passwd",
    "FILE:/etc/passwd",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "dict://127.0.0.1:11211/stats",
    "ftp://127.0.0.1/",
    "ldap://127.0.0.1/",
    "jar:http://127.0.0.1!/",
    "ws://127.0.0.1/",
    "https+http://127.0.0.1/",
    "http://127.0.0.1:8265/api/jobs/",
    "http://localhost:6379/",
    "http://kubernetes.default.svc:443/",
    "http://metadata.google.internal/computeMetadata/v1/",
]


def url_of(host: str) -> str:
    """A URL of an address, or of one of its spellings."""
    bare = ":" in host and not host.startswith("[") and "%" not in host and "@" not in host
    return f"http://[{host}]/" if bare else f"http://{host}/"


def inputs() -> list[str]:
    """All of them as URLs, each once."""
    urls = [url_of(each) for each in (*NOT_PUBLIC, *SPELLINGS)] + DISPUTED
    return list(dict.fromkeys(urls))
