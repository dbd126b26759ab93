//! What is known about the requests of inspected connections, and the parsing of their heads.
//! `server::requests` inspects them.

use std::{collections::HashMap, sync::Mutex};

use http::Method;

use super::outside::Window;
use crate::sync::lock;

/// What is known about the requests of each [inspected](super::flags::INSPECTED) connection. It is
/// apart from the connection entries, because few connections have a request that is being inspected at a time.
#[derive(Default)]
pub(crate) struct Requests(Mutex<HashMap<usize, Box<Known>>>);

impl Requests {
    /// Removes what is known about a connection, and returns it.
    pub(crate) fn take(&self, connection: usize) -> Option<Box<Known>> {
        lock!(self.0).remove(&connection)
    }

    pub(crate) fn put(&self, connection: usize, known: Box<Known>) {
        lock!(self.0).insert(connection, known);
    }
}

#[derive(Default)]
pub(crate) struct Known {
    /// The part that has been read of an incomplete head.
    pub(crate) head: Vec<u8>,
    /// A request has been read, and its response has not been written.
    pub(crate) asked: bool,
    /// After the response, the next read begins with another request.
    pub(crate) another: bool,
    /// The last request asks for an upgrade.
    pub(crate) upgrades: bool,
    pub(crate) requests: u8,
    pub(crate) window: Option<Window>,
}

/// Whether these bytes may be the beginning of an HTTP/1 request.
pub(crate) fn is_http1(head: &[u8]) -> bool {
    const LONGEST: usize = "CONNECT".len();
    // Also one byte more, which shows that a method is longer.
    let begin = &head[..head.len().min(LONGEST + 1)];
    let mut parts = begin.split(|byte| matches!(byte, b' ' | b'\r'));
    let method = parts.next().unwrap_or(begin);
    method.len() <= LONGEST && method.iter().all(u8::is_ascii_uppercase)
}

/// The method, the path and the header fields of a head.
pub(crate) fn parse(head: &[u8]) -> Option<(Method, &str, impl Iterator<Item = &str>)> {
    let mut lines = std::str::from_utf8(head).ok()?.split("\r\n");
    let mut request = lines.next()?.split(' ');
    let (method, target, version) = (request.next()?, request.next()?, request.next()?);
    if request.next().is_some() || !matches!(version, "HTTP/1.1" | "HTTP/1.0") {
        return None;
    }
    let path = target.split(['?', '#']).next()?;
    Some((Method::from_bytes(method.as_bytes()).ok()?, path, lines))
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use super::*;

    #[test]
    fn http1_begins_with_a_method_in_capitals() {
        for head in [
            "GET / HTTP/1.1\r\n\r\n",
            "OPTIONS *",
            "CONNECT",
            "GE",
            "GET\r",
        ] {
            assert!(is_http1(head.as_bytes()), "{head}");
        }
        for head in [
            "\u{16}\u{3}\u{1}",
            "get / HTTP/1.1\r\n",
            "PROPFIND /",
            "GET2 /",
        ] {
            assert!(!is_http1(head.as_bytes()), "{head}");
        }
    }

    #[test]
    fn a_head_is_parsed_if_its_first_line_has_three_parts_and_a_known_version() {
        let head = "POST /a/b?c#d HTTP/1.1\r\nhost: test\r\n\r\n";
        let (method, path, lines) = parse(head.as_bytes()).unwrap();
        assert_eq!((method, path), (Method::POST, "/a/b"));
        assert_eq!(lines.collect::<Vec<_>>(), ["host: test", "", ""]);
        assert!(parse(b"GET / HTTP/1.0\r\n\r\n").is_some());
        for head in [
            "GET / HTTP/1.1 x",
            "GET / HTTP/2.0",
            "GET /",
            "GET / x x",
            "",
        ] {
            assert!(parse(head.as_bytes()).is_none(), "{head}");
        }
    }

    #[test]
    fn what_is_put_is_taken_once() {
        let requests = Requests::default();
        let known = Known {
            requests: 2,
            ..Known::default()
        };
        requests.put(7, Box::new(known));
        assert!(requests.take(8).is_none());
        assert_eq!(requests.take(7).unwrap().requests, 2);
        assert!(requests.take(7).is_none());
    }
}
