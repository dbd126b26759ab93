//! Responses of HTTP/1.1, parsed as their bytes arrive.

/// The responses on one connection so far.
#[derive(Default)]
pub(crate) struct Responses {
    bytes: Vec<u8>,
    state: State,
    pub(crate) seen: Vec<Response>,
    /// The server has said that it closes the connection after a response.
    pub(crate) closes: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) length: usize,
    pub(crate) whole: bool,
    pub(crate) closes: bool,
}

#[derive(Clone, Copy, Default)]
enum State {
    #[default]
    Head,
    /// So many bytes of the body are missing.
    Length(usize),
    ChunkHead,
    Chunk(usize),
    /// After the last chunk.
    Trailers,
}

impl Responses {
    /// Takes bytes that the client has read.
    pub(crate) fn read(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        while self.step() {}
    }

    pub(crate) fn whole(&self) -> usize {
        self.seen.iter().filter(|response| response.whole).count()
    }

    /// Whether there may be more.
    fn step(&mut self) -> bool {
        match self.state {
            State::Head => {
                let Some(head) = self.take_until(b"\r\n\r\n") else {
                    return false;
                };
                self.head(&head);
            }
            State::Length(missing) => {
                let taken = self.take_body(missing);
                if taken < missing {
                    self.state = State::Length(missing - taken);
                    return false;
                }
                self.end();
            }
            State::ChunkHead => {
                let Some(line) = self.take_until(b"\r\n") else {
                    return false;
                };
                let length = usize::from_str_radix(&line, 16).expect("the length of a chunk");
                self.state = if length == 0 {
                    State::Trailers
                } else {
                    State::Chunk(length)
                };
            }
            State::Chunk(missing) => {
                let taken = self.take_body(missing);
                if taken < missing {
                    self.state = State::Chunk(missing - taken);
                    return false;
                }
                let Some(line) = self.take_until(b"\r\n") else {
                    self.state = State::Chunk(0);
                    return false;
                };
                assert_eq!(line, "", "after a chunk");
                self.state = State::ChunkHead;
            }
            State::Trailers => {
                let Some(line) = self.take_until(b"\r\n") else {
                    return false;
                };
                assert_eq!(line, "", "no handler has trailers");
                self.end();
            }
        }
        true
    }

    fn head(&mut self, head: &str) {
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap_or_default();
        let status = status.strip_prefix("HTTP/1.1 ").expect("a status line");
        let status = status[..3].parse().expect("a status");
        let mut state = None;
        let mut closes = false;
        for line in lines {
            let (name, value) = line.split_once(": ").expect("a field");
            match name {
                "content-length" => state = Some(State::Length(value.parse().expect("a length"))),
                "transfer-encoding" => state = Some(State::ChunkHead),
                "connection" if value == "close" => closes = true,
                _ => {}
            }
        }
        self.state = state.expect("a response with a length or chunks");
        self.closes |= closes;
        self.seen.push(Response {
            status,
            length: 0,
            whole: false,
            closes,
        });
    }

    fn end(&mut self) {
        self.state = State::Head;
        if let Some(response) = self.seen.last_mut() {
            response.whole = true;
        }
    }

    fn take_body(&mut self, most: usize) -> usize {
        let length = most.min(self.bytes.len());
        self.bytes.drain(..length);
        if let Some(response) = self.seen.last_mut() {
            response.length += length;
        }
        length
    }

    /// The text before `end`, which is removed too.
    fn take_until(&mut self, end: &[u8]) -> Option<String> {
        let mut windows = self.bytes.windows(end.len());
        let at = windows.position(|window| window == end)?;
        let text = self.bytes.drain(..at).collect();
        self.bytes.drain(..end.len());
        Some(String::from_utf8(text).expect("text"))
    }
}
