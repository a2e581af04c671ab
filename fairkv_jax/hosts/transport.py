"""The sockets between the hosts: ZeroMQ, authenticated and encrypted with CURVE.

    leader  XPUB ──► SUB   followers      every message to every follower, in order
    leader  PULL ◄── PUSH  followers

The leader binds both sockets to the coordinator's address, at ports that the system chooses. Every
host makes a pair of keys. The public halves and the ports are handed over through the coordinator;
the leader accepts only the keys of its followers, and they only the leader's.

Messages are numbered. A gap means that a connection was lost and made again: what was sent
meanwhile is lost, and the receiver raises.
"""

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from fairkv_jax.hosts.messages import pack, unpack

_LINGER_MS = 1000
"""Time that messages have to leave when a socket is closed."""
_SUBSCRIBED = b"\x01"


class Keys:
    """A pair of CURVE keys."""

    def __init__(self) -> None:
        public, self._secret = zmq.curve_keypair()
        self.public = public.decode()

    def apply(self, socket: zmq.Socket) -> None:
        socket.curve_publickey = self.public.encode()
        socket.curve_secretkey = self._secret


class LeaderSockets:
    """The leader's side; several threads may send, one receives."""

    def __init__(self, address: str, keys: Keys, followers: Mapping[str, int]):
        """Binds to an IP address; `followers` are the host indices by public key.

        Raises:
            ValueError: the address is not this machine's.
        """
        self._context = zmq.Context()
        self._followers = followers
        self._lock = threading.RLock()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", _Followers(followers))
        self._out = self._socket(zmq.XPUB, keys)
        self._out.xpub_verboser = 1
        self._in = self._socket(zmq.PULL, keys)
        try:
            self.endpoints = [_bind(each, address) for each in (self._out, self._in)]
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(
                f"host 0 cannot listen on the coordinator's address {address} ({error}): give an "
                "address of this machine as --coordinator"
            ) from error
        self._sent = 0
        self._received: dict[int, int] = {}
        """Messages of each host."""

    def wait_for_followers(self, timeout_s: float) -> bool:
        """Waits until all followers receive what is sent; returns whether they do in time."""
        missing = len(self._followers)
        while missing and self._out.poll(int(timeout_s * 1000)):
            missing -= self._out.recv().startswith(_SUBSCRIBED)
        return not missing

    def send(self, message: Any) -> None:
        """Sends a message to all followers; returns before they have it."""
        with self._lock:
            if not self._out.closed:
                self._out.send(pack(self._sent, message))
                self._sent += 1

    def receive(self, timeout_s: float) -> Iterator[tuple[int, Any]]:
        """Waits for messages, and yields them with the index of the host that sent each.

        Raises:
            ValueError: a message was lost, or cannot be read.
        """
        timeout_ms = int(timeout_s * 1000)
        while self._in.poll(timeout_ms):
            frame = self._in.recv(copy=False)
            # The key of the connection says who sent it, not the message.
            host = self._followers[str(frame.get("User-Id"))]
            number, message = unpack(frame.bytes)
            _check_number(number, self._received.get(host, 0), f"host {host}")
            self._received[host] = number + 1
            yield host, message
            timeout_ms = 0

    def close(self) -> None:
        """Sends what is on its way, for at most a second."""
        with self._lock:
            self._out.close(_LINGER_MS)
            self._in.close(0)
        self._authenticator.stop()
        self._context.term()

    def _socket(self, kind: int, keys: Keys) -> zmq.Socket:
        socket = _socket(self._context, kind)
        keys.apply(socket)
        socket.curve_server = True
        return socket


class FollowerSockets:
    """A follower's side; several threads may send, one receives."""

    def __init__(self, endpoints: list[str], keys: Keys, leader_key: str):
        # Two contexts, so that one thread can flush one while another thread receives.
        self._contexts = zmq.Context(), zmq.Context()
        self._in, self._out = map(_socket, self._contexts, (zmq.SUB, zmq.PUSH))
        for socket, endpoint in zip((self._in, self._out), endpoints, strict=True):
            keys.apply(socket)
            socket.curve_serverkey = leader_key.encode()
            socket.connect(endpoint)
        self._in.subscribe(b"")
        self._lock = threading.Lock()
        self._sent = self._received = 0

    def send(self, message: Any) -> None:
        """Sends a message to the leader; returns before it has it."""
        with self._lock:
            if not self._out.closed:
                # Refused connections would block; the leader notices what is missing.
                with suppress(zmq.Again):
                    self._out.send(pack(self._sent, message), zmq.NOBLOCK)
                self._sent += 1

    def receive(self, timeout_s: float) -> Iterator[Any]:
        """Waits for messages, and yields them.

        Raises:
            ValueError: a message was lost, or cannot be read.
        """
        timeout_ms = int(timeout_s * 1000)
        while self._in.poll(timeout_ms):
            number, message = unpack(self._in.recv())
            _check_number(number, self._received, "the leader")
            self._received += 1
            yield message
            timeout_ms = 0

    def flush(self) -> None:
        """Sends what is on its way, for at most a second; nothing can be sent afterwards."""
        with self._lock:
            self._out.close(_LINGER_MS)
        self._contexts[1].term()

    def close(self) -> None:
        """Flushes and closes both sockets; no other thread may be receiving."""
        self.flush()
        self._in.close(0)
        self._contexts[0].term()


class _Followers:
    """Tells ZeroMQ which keys belong to followers."""

    def __init__(self, keys: Collection[str]):
        self._keys = frozenset(keys)

    def callback(self, domain: str, key: bytes) -> bool:
        """Returns whether to accept a connection of the holder of a key, in Z85."""
        return key.decode() in self._keys


def _socket(context: zmq.Context, kind: int) -> zmq.Socket:
    """Makes a socket that drops no message: every step waits for all hosts, so few are queued."""
    socket = context.socket(kind)
    socket.ipv6 = True
    socket.sndhwm = socket.rcvhwm = 0
    return socket


def _bind(socket: zmq.Socket, address: str) -> str:
    """Binds to a free port and returns the endpoint."""
    at = f"tcp://[{address}]" if ":" in address else f"tcp://{address}"
    return f"{at}:{socket.bind_to_random_port(at)}"


def _check_number(number: int, expected: int, sender: str) -> None:
    if number != expected:
        raise ValueError(
            f"message {expected} of {sender} was lost, message {number} came instead: the "
            "connection was interrupted"
        )
