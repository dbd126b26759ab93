//! An HTTP/1 client that reads and writes bytes without a library, so that tests see exactly what is sent.
//! Two HTTP/2 clients: `http2` uses a library, `frames` does not.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use crate::process::BOUND;

/// From now on the client receives and acknowledges nothing. What it sends still leaves.
#[cfg(target_os = "linux")]
pub(crate) fn vanish(stream: &TcpStream) {
    const RETURN: u16 = 0x06;

    let discard = [socket2::SockFilter::new(RETURN, 0, 0, 0)];
    let socket = socket2::SockRef::from(stream);
    socket.attach_filter(&discard).unwrap();
}

/// Other systems have no such filter. The peer is silent there, and its kernel is not.
#[cfg(not(target_os = "linux"))]
pub(crate) fn vanish(_: &TcpStream) {}

pub(crate) struct Connection {
    stream: BufReader<TcpStream>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Response {
    pub(crate) version: String,
    pub(crate) status: u16,
    /// Header fields, with names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Response {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str())
    }

    pub(crate) fn says_close(&self) -> bool {
        self.header("connection")
            .is_some_and(|value| value.split(',').any(|option| option.trim() == "close"))
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    #[track_caller]
    pub(crate) fn assert_ok(&self) {
        assert_eq!(self.status, 200, "{self:?}");
    }
}

impl Connection {
    #[track_caller]
    pub(crate) fn open(address: SocketAddr) -> Self {
        Self::try_open(address).unwrap_or_else(|error| panic!("cannot connect: {error}"))
    }

    pub(crate) fn try_open(address: SocketAddr) -> io::Result<Self> {
        Self::on(TcpStream::connect_timeout(
            &address,
            Duration::from_secs(5),
        )?)
    }

    pub(crate) fn on(stream: TcpStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(BOUND))?;
        stream.set_write_timeout(Some(BOUND))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    pub(crate) fn stream(&self) -> &TcpStream {
        self.stream.get_ref()
    }

    /// Whether the server has closed the connection. Clients check this before they reuse a connection.
    pub(crate) fn has_ended(&self) -> bool {
        let stream = self.stream.get_ref();
        stream.set_nonblocking(true).unwrap();
        let peeked = stream.peek(&mut [0]);
        stream.set_nonblocking(false).unwrap();
        !matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    #[track_caller]
    pub(crate) fn send(&mut self, text: &str) {
        self.try_send(text.as_bytes())
            .unwrap_or_else(|error| panic!("cannot send: {error}"));
    }

    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes)
    }

    #[track_caller]
    pub(crate) fn get(&mut self, path: &str) -> Response {
        self.request("GET", path)
    }

    #[track_caller]
    pub(crate) fn request(&mut self, method: &str, path: &str) -> Response {
        self.try_request(method, path)
            .unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    pub(crate) fn try_request(&mut self, method: &str, path: &str) -> io::Result<Response> {
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: test\r\ncontent-length: 0\r\n\r\n");
        self.try_send(request.as_bytes())?;
        self.try_response(method)
    }

    /// Reads the response to a request with this method.
    #[track_caller]
    pub(crate) fn response(&mut self, method: &str) -> Response {
        self.try_response(method)
            .unwrap_or_else(|error| panic!("no response: {error}"))
    }

    pub(crate) fn try_response(&mut self, method: &str) -> io::Result<Response> {
        let mut response = self.try_head()?;
        let length = response
            .header("content-length")
            .map(|value| value.parse().unwrap());
        let bodiless = method == "HEAD" || matches!(response.status, 100..=199 | 204 | 304);
        response.body = match length {
            _ if bodiless => Vec::new(),
            Some(length) => self.exactly(length)?,
            None if response.header("transfer-encoding") == Some("chunked") => self.chunks()?,
            None => self.rest()?,
        };
        Ok(response)
    }

    #[track_caller]
    pub(crate) fn head(&mut self) -> Response {
        self.try_head()
            .unwrap_or_else(|error| panic!("no head: {error}"))
    }

    /// Waits for a byte. False if the server has closed its side instead.
    pub(crate) fn has_more(&mut self) -> io::Result<bool> {
        Ok(!self.stream.fill_buf()?.is_empty())
    }

    pub(crate) fn try_head(&mut self) -> io::Result<Response> {
        let status_line = self.line()?;
        let mut parts = status_line.splitn(3, ' ');
        let version = parts.next().unwrap_or_default().to_owned();
        let status = parts.next().and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| io::Error::other(format!("head {status_line:?}")))?;
        let mut headers = Vec::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').unwrap();
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        Ok(Response {
            version,
            status,
            headers,
            body: Vec::new(),
        })
    }

    pub(crate) fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }

    pub(crate) fn exactly(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    pub(crate) fn chunks(&mut self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let size = usize::from_str_radix(&self.line()?, 16).map_err(io::Error::other)?;
            body.extend(self.exactly(size)?);
            self.line()?;
            if size == 0 {
                return Ok(body);
            }
        }
    }

    pub(crate) fn rest(&mut self) -> io::Result<Vec<u8>> {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest)?;
        Ok(rest)
    }

    /// Asserts that the server closes the connection without a further byte.
    #[track_caller]
    pub(crate) fn assert_closed(mut self) {
        let rest = self
            .rest()
            .unwrap_or_else(|error| panic!("not closed: {error}"));
        assert_eq!(String::from_utf8_lossy(&rest), "");
    }
}

/// HTTP/2 with prior knowledge: several requests on one connection.
pub(crate) mod http2 {
    use std::net::SocketAddr;

    use http_body_util::{BodyExt, Empty};
    use hyper::{Request, body::Bytes, client::conn::http2, header::HeaderMap};
    use hyper_util::rt::{TokioExecutor, TokioIo};

    pub(crate) struct Connection {
        runtime: tokio::runtime::Runtime,
        sender: http2::SendRequest<Empty<Bytes>>,
        address: SocketAddr,
    }

    #[derive(Debug)]
    pub(crate) struct Response {
        pub(crate) status: u16,
        pub(crate) headers: HeaderMap,
        pub(crate) body: Bytes,
    }

    impl Connection {
        pub(crate) fn open(address: SocketAddr) -> Self {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap();
            let sender = runtime.block_on(async {
                let stream = tokio::net::TcpStream::connect(address).await.unwrap();
                let io = TokioIo::new(stream);
                let (sender, connection) =
                    http2::handshake(TokioExecutor::new(), io).await.unwrap();
                tokio::spawn(connection);
                sender
            });
            Self {
                runtime,
                sender,
                address,
            }
        }

        /// Sends a request. The returned function waits for its response.
        pub(crate) fn begin(
            &self,
            path: &str,
            headers: &[(&'static str, &'static str)],
        ) -> impl FnOnce() -> hyper::Result<Response> + use<> {
            let mut request = Request::get(format!("http://{}{path}", self.address));
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            let request = request.body(Empty::new()).unwrap();
            let mut sender = self.sender.clone();
            let handle = self.runtime.handle().clone();
            let task = handle.spawn(async move {
                sender.ready().await?;
                let response = sender.send_request(request).await?;
                let (head, body) = response.into_parts();
                Ok(Response {
                    status: head.status.as_u16(),
                    headers: head.headers,
                    body: body.collect().await?.to_bytes(),
                })
            });
            move || handle.block_on(task).unwrap()
        }

        #[track_caller]
        pub(crate) fn get(&self, path: &str) -> Response {
            self.begin(path, &[])().unwrap()
        }
    }
}

/// HTTP/2 frame by frame ([RFC 9113 §4.1](https://www.rfc-editor.org/rfc/rfc9113#section-4.1)), to
/// see what a client library does not show.
pub(crate) mod frames {
    use std::{
        io::{self, Read, Write},
        net::{SocketAddr, TcpStream},
        time::Duration,
    };

    pub(crate) const DATA: u8 = 0;
    pub(crate) const HEADERS: u8 = 1;
    pub(crate) const RST_STREAM: u8 = 3;
    pub(crate) const SETTINGS: u8 = 4;
    pub(crate) const PING: u8 = 6;
    pub(crate) const GOAWAY: u8 = 7;
    pub(crate) const WINDOW_UPDATE: u8 = 8;
    pub(crate) const CONTINUATION: u8 = 9;
    const ACK: u8 = 1;
    pub(crate) const END_STREAM: u8 = 1;
    pub(crate) const END_HEADERS: u8 = 4;
    pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    /// Encodes a frame.
    pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut frame = length[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        frame
    }

    /// The payload of a HEADERS frame that requests this path.
    pub(crate) fn request(method: Method, path: &str) -> Vec<u8> {
        // The method and the scheme are indexed, the path and the authority are literals (RFC 7541 §6).
        let mut head = vec![method as u8, 0x86, 0x04, u8::try_from(path.len()).unwrap()];
        head.extend(path.as_bytes());
        head.extend(b"\x01\x04test");
        head
    }

    /// Entries of the static table (RFC 7541 Appendix A).
    #[derive(Clone, Copy)]
    pub(crate) enum Method {
        Get = 0x82,
        Post = 0x83,
    }

    /// A client with prior knowledge. It acknowledges SETTINGS and PING.
    pub(crate) struct Connection<S = TcpStream> {
        stream: S,
        next: u32,
    }

    const TIMEOUT: Option<Duration> = Some(Duration::from_secs(10));

    #[derive(Debug)]
    pub(crate) struct Frame {
        pub(crate) kind: u8,
        pub(crate) flags: u8,
        pub(crate) stream: u32,
        pub(crate) payload: Vec<u8>,
    }

    impl Frame {
        /// The last stream that a GOAWAY frame says is answered.
        pub(crate) fn last_stream(&self) -> u32 {
            assert_eq!(self.kind, GOAWAY, "{self:?}");
            u32::from_be_bytes(self.payload[..4].try_into().unwrap())
        }

        /// Whether this HEADERS frame has the status 200.
        pub(crate) fn is_ok(&self) -> bool {
            // `:status: 200` is entry 8 of the static table (RFC 7541 Appendix A). It is the first
            // field, and only an update of the table's size may precede it.
            let head = &self.payload;
            self.kind == HEADERS && (head[0] == 0x88 || head[0] & 0xe0 == 0x20 && head[1] == 0x88)
        }
    }

    impl Connection {
        pub(crate) fn open(address: SocketAddr) -> Self {
            Self::on(TcpStream::connect(address).unwrap(), &[])
        }

        /// Begins HTTP/2 on this stream, with these settings.
        pub(crate) fn on(stream: TcpStream, settings: &[u8]) -> Self {
            stream.set_nodelay(true).unwrap();
            stream.set_read_timeout(TIMEOUT).unwrap();
            Self::over(stream, settings)
        }

        pub(crate) fn stream(&self) -> &TcpStream {
            &self.stream
        }

        /// Reads until no frame has arrived for `quiet`. Returns the frames about streams, and GOAWAY.
        pub(crate) fn until_quiet(&mut self, quiet: Duration) -> Vec<Frame> {
            let mut frames = Vec::new();
            loop {
                self.stream.set_read_timeout(Some(quiet)).unwrap();
                let is_more = self.stream.peek(&mut [0]).is_ok_and(|bytes| bytes > 0);
                self.stream.set_read_timeout(TIMEOUT).unwrap();
                if !is_more {
                    return frames;
                }
                let frame = self.read();
                frames.extend(frame.filter(|frame| matches!(frame.kind, DATA | HEADERS | GOAWAY)));
            }
        }
    }

    impl<S: Read + Write> Connection<S> {
        /// Begins HTTP/2 on this stream, whose timeouts are set, with these settings.
        pub(crate) fn over(mut stream: S, settings: &[u8]) -> Self {
            stream.write_all(PREFACE).unwrap();
            let mut connection = Self { stream, next: 1 };
            connection.send(SETTINGS, 0, 0, settings).unwrap();
            connection
        }

        pub(crate) fn send(
            &mut self,
            kind: u8,
            flags: u8,
            stream: u32,
            payload: &[u8],
        ) -> io::Result<()> {
            self.stream.write_all(&frame(kind, flags, stream, payload))
        }

        /// Sends a request, and returns its stream.
        pub(crate) fn begin(&mut self, path: &str) -> io::Result<u32> {
            let head = request(Method::Get, path);
            let stream = self.next;
            self.next += 2;
            self.send(HEADERS, END_STREAM | END_HEADERS, stream, &head)?;
            Ok(stream)
        }

        /// Sends an extended CONNECT ([RFC 8441 §4](https://www.rfc-editor.org/rfc/rfc8441#section-4)).
        pub(crate) fn connect(&mut self, path: &str, protocol: &str) -> io::Result<u32> {
            let mut head = Vec::new();
            for (name, value) in [
                (":method", "CONNECT"),
                (":protocol", protocol),
                (":scheme", "http"),
                (":path", path),
                (":authority", "test"),
                // Protocols other than WebSocket ignore this.
                ("sec-websocket-version", "13"),
            ] {
                head.push(0);
                for text in [name, value] {
                    head.push(u8::try_from(text.len()).unwrap());
                    head.extend(text.as_bytes());
                }
            }
            let stream = self.next;
            self.next += 2;
            self.send(HEADERS, END_HEADERS, stream, &head)?;
            Ok(stream)
        }

        pub(crate) fn data(&mut self, stream: u32, data: &[u8]) -> io::Result<()> {
            self.send(DATA, 0, stream, data)
        }

        pub(crate) fn end(&mut self, stream: u32) -> io::Result<()> {
            self.send(DATA, END_STREAM, stream, &[])
        }

        /// The next frame, or `None` when the server has closed.
        pub(crate) fn read(&mut self) -> Option<Frame> {
            let mut head = [0; 9];
            match self.stream.read_exact(&mut head) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return None,
                result => result.unwrap(),
            }
            let [a, b, c, kind, flags, stream @ ..] = head;
            let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
            self.stream.read_exact(&mut payload).unwrap();
            // The server may have closed its side already.
            let _ = match (kind, flags & ACK) {
                (SETTINGS, 0) => self.send(SETTINGS, ACK, 0, &[]),
                (PING, 0) => self.send(PING, ACK, 0, &payload),
                _ => Ok(()),
            };
            Some(Frame {
                kind,
                flags,
                stream: u32::from_be_bytes(stream),
                payload,
            })
        }

        /// The next frame of this kind. Skips other frames.
        #[track_caller]
        pub(crate) fn next(&mut self, kind: u8) -> Frame {
            loop {
                match self.read() {
                    Some(frame) if frame.kind == kind => return frame,
                    Some(_) => {}
                    None => panic!("closed before a frame of kind {kind}"),
                }
            }
        }

        /// Reads until a frame ends the response. The last frame may be empty.
        #[track_caller]
        pub(crate) fn end_of_stream(&mut self) {
            while self.next(DATA).flags & END_STREAM == 0 {}
        }

        /// Reads until the server has closed.
        pub(crate) fn until_closed(&mut self) {
            while self.read().is_some() {}
        }
    }
}
