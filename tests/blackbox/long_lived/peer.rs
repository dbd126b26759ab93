//! Clients of long-lived routes: a WebSocket client that sends single frames, one that follows the protocol,
//! and a reader of events.

use std::{
    io,
    net::{SocketAddr, TcpStream},
};

use tungstenite::{Message, WebSocket, protocol::CloseFrame};

use crate::{client::Connection, process::Server};

pub(crate) const TEXT: u8 = 1;
pub(crate) const CLOSE: u8 = 8;
const FIN: u8 = 0x80;
const MASKED: u8 = 0x80;

/// Encodes a short frame of a client ([RFC 6455 §5.2](https://www.rfc-editor.org/rfc/rfc6455#section-5.2)).
pub(crate) fn masked(opcode: u8, payload: &[u8]) -> Vec<u8> {
    const MASK: [u8; 4] = [1, 2, 3, 4];
    let length = u8::try_from(payload.len()).unwrap();
    assert!(length < 126, "longer ones have their length elsewhere");
    let mut frame = vec![FIN | opcode, MASKED | length];
    frame.extend(MASK);
    let mask = MASK.iter().cycle();
    frame.extend(payload.iter().zip(mask).map(|(byte, mask)| byte ^ mask));
    frame
}

/// The payload of a close frame: a code and a reason.
pub(crate) fn close(code: u16, reason: &str) -> Vec<u8> {
    [&code.to_be_bytes(), reason.as_bytes()].concat()
}

/// The upgrade request of a WebSocket.
pub(crate) fn handshake(path: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
}

/// A peer that sends and answers nothing by itself.
pub(crate) struct Raw(pub(crate) Connection);

impl Raw {
    #[track_caller]
    pub(crate) fn open(server: &Server, path: &str) -> Self {
        let mut connection = server.connect();
        connection.send(&handshake(path));
        let head = connection.head();
        assert_eq!(head.status, 101, "{head:?}");
        Self(connection)
    }

    pub(crate) fn send(&mut self, opcode: u8, payload: &[u8]) -> io::Result<()> {
        self.0.try_send(&masked(opcode, payload))
    }

    /// The next frame: its opcode and its payload.
    #[track_caller]
    pub(crate) fn read(&mut self) -> (u8, Vec<u8>) {
        let read = self.0.exactly(2).and_then(|head| {
            assert!(head[0] & FIN != 0 && head[1] < 126, "{head:?}");
            Ok((head[0] & !FIN, self.0.exactly(head[1].into())?))
        });
        read.unwrap_or_else(|error| panic!("no frame: {error}"))
    }
}

/// A peer that follows the protocol.
pub(crate) type Socket = WebSocket<TcpStream>;

#[track_caller]
pub(crate) fn open(server: &Server, path: &str) -> Socket {
    match try_open(server.address, path) {
        Ok(socket) => socket,
        Err(error) => panic!("no WebSocket: {error}"),
    }
}

pub(crate) fn try_open(
    address: SocketAddr,
    path: &str,
) -> Result<Socket, Box<dyn std::error::Error>> {
    let connection = Connection::try_open(address)?;
    let stream = connection.stream().try_clone()?;
    let (socket, _) = tungstenite::client(format!("ws://{address}{path}"), stream)?;
    Ok(socket)
}

#[track_caller]
pub(crate) fn assert_echoes(socket: &mut Socket, text: &str) {
    socket.send(Message::text(text)).unwrap();
    assert_eq!(socket.read().unwrap(), Message::text(text));
}

/// Reads the server's close frame, which must be the next frame, and answers it. Returns when the server
/// has closed the connection.
#[track_caller]
pub(crate) fn closed(mut socket: Socket) -> CloseFrame {
    let message = socket.read().unwrap();
    let Message::Close(Some(close)) = message else {
        panic!("not a Close: {message:?}");
    };
    let end = socket.read().unwrap_err();
    assert!(
        matches!(end, tungstenite::Error::ConnectionClosed),
        "{end:?}"
    );
    close
}

/// The fields of one server-sent event.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) kind: String,
    pub(crate) data: String,
    pub(crate) retry: String,
}

/// The events of a body. Panics if the last event is incomplete.
#[track_caller]
pub(crate) fn events(body: &[u8]) -> Vec<Event> {
    let body = std::str::from_utf8(body).unwrap();
    let parse = |block: &str| {
        let mut event = Event::default();
        for line in block.lines() {
            let (name, value) = line.split_once(": ").unwrap();
            let field = match name {
                "event" => &mut event.kind,
                "data" => &mut event.data,
                "retry" => &mut event.retry,
                _ => panic!("{line:?}"),
            };
            value.clone_into(field);
        }
        event
    };
    let mut blocks: Vec<_> = body.split("\n\n").collect();
    assert_eq!(blocks.pop(), Some(""), "the last event is not whole");
    blocks.into_iter().map(parse).collect()
}

/// Asserts that the events are the numbers from zero on, at least `least`, and then the last event.
#[track_caller]
pub(crate) fn assert_ended(body: &[u8], numbers: usize) {
    let mut all = events(body);
    let last = all.pop().unwrap();
    assert_eq!(
        (&*last.kind, &*last.data, &*last.retry),
        ("goodbye", "deploy", "5000")
    );
    assert!(all.len() >= numbers, "{all:?}");
    for (number, event) in all.iter().enumerate() {
        assert_eq!(event.data, number.to_string(), "{all:?}");
    }
}
