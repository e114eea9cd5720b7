"""The tokens of operators: only the right one, sent once, identifies its operator."""

from api_gateway.admin.operators import LOCAL, Operator, Role, Tokens, bearer_token
from api_gateway.http1.headers import fields_of
from tests.cases import each

READER, OPERATOR = Operator("prometheus", Role.READ), Operator("alice", Role.OPERATE)
TOKEN = b"a-long-enough-token"
TOKENS = Tokens([(READER, b"read-only-token"), (OPERATOR, TOKEN), (OPERATOR, b"alice-had-this-before")])


@each(
    ("given", "operator"),
    [
        (TOKEN, OPERATOR),
        (b"alice-had-this-before", OPERATOR),
        (b"read-only-token", READER),
        (b"", None),
        (TOKEN[:-1], None),
        (TOKEN + b"x", None),
        (TOKEN.upper(), None),
        (b"\xff\xfe", None),
    ],
)
def test_a_token_identifies_its_operator(given: bytes, operator: Operator | None) -> None:
    assert TOKENS.find(given) == operator
    assert Tokens().find(given) is None


def test_no_token_is_shown() -> None:
    assert repr(TOKENS) == "<Tokens of prometheus, alice>"
    assert (bool(TOKENS), bool(Tokens())) == (True, False)
    assert TOKEN.decode() not in str(vars(TOKENS))


def test_the_role_operate_includes_read() -> None:
    assert [(who.may(Role.READ), who.may(Role.OPERATE)) for who in (READER, OPERATOR, LOCAL)] == [
        (True, False),
        (True, True),
        (True, True),
    ]


@each(
    ("sent", "token"),
    [
        ([], None),
        ([b"Bearer secret"], b"secret"),
        ([b"bearer secret"], b"secret"),
        ([b"BEARER   secret "], b"secret"),
        (["Bearer gehëim-tøken".encode()], "gehëim-tøken".encode()),
        ([b"Basic c2VjcmV0"], None),
        ([b"secret"], None),
        ([b""], None),
        ([b"Bearer"], b""),
        ([b"Bearer\tsecret"], None),
        ([b"Bearer secret"] * 2, b""),
        ([b"Basic c2VjcmV0", b"Bearer secret"], b""),
    ],
)
def test_one_bearer_token_is_taken(sent: list[bytes], token: bytes | None) -> None:
    """RFC 9110 section 11.1: the name of a scheme is case-insensitive."""
    assert bearer_token(fields_of([(b"Authorization", value) for value in sent])) == token
