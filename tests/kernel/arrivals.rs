//! When each request of a client was complete in the receive buffer of the server.

use tokio::time::Instant;

use crate::{
    client,
    kernel::{Facts, Pieces},
    schedule::{Client, Speaks},
};

/// The preface of HTTP/2.
const PREFACE: usize = 24;
/// The head of a frame of HTTP/2.
const HEAD: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;

impl Pieces {
    fn bytes(&self) -> Vec<u8> {
        let pieces = self.0.iter();
        pieces
            .flat_map(|(_, piece)| piece.iter().copied())
            .collect()
    }

    /// When so many bytes had arrived.
    fn at(&self, length: usize) -> Option<Instant> {
        let mut total = 0;
        let mut pieces = self.0.iter();
        let last = pieces.find(|(_, piece)| {
            total += piece.len();
            total >= length
        });
        last.map(|(at, _)| *at)
    }
}

/// `None` for a request that has not arrived completely, or only after a GOAWAY that tells the client to repeat it.
pub(crate) fn complete(client: &Client, number: usize, facts: &Facts) -> Vec<Option<Instant>> {
    match client.speaks {
        Speaks::Http1 { .. } => {
            let mut total = 0;
            let requests = client.requests.iter().enumerate();
            let complete = requests.map(|(index, request)| {
                total += client::head(number, index, request).len() + request.upload;
                facts.arrived.at(total)
            });
            complete.collect()
        }
        Speaks::Http2 { .. } => {
            let mut complete = vec![None; client.requests.len()];
            for frame in frames(&facts.arrived.bytes()[..], PREFACE) {
                let ends = frame.kind == DATA || frame.kind == HEADERS;
                if ends && frame.flags & END_STREAM != 0 {
                    // The client opens the streams 1, 3, 5, and so on.
                    complete[frame.stream / 2] = facts.arrived.at(frame.end);
                }
            }
            for frame in frames(&facts.written.bytes()[..], 0) {
                if frame.kind == GOAWAY {
                    let said = facts.written.at(frame.end);
                    let last = number_of(&frame.payload[..4]);
                    for complete in complete.iter_mut().skip(last.div_ceil(2)) {
                        *complete = complete.filter(|complete| Some(*complete) < said);
                    }
                }
            }
            complete
        }
    }
}

struct Frame<'a> {
    kind: u8,
    flags: u8,
    stream: usize,
    payload: &'a [u8],
    /// After how many bytes it ends.
    end: usize,
}

fn number_of(digits: &[u8]) -> usize {
    let digits = digits.iter();
    digits.fold(0, |number, digit| number << 8 | usize::from(*digit))
}

/// The whole frames from this byte on.
fn frames(bytes: &[u8], mut begin: usize) -> impl Iterator<Item = Frame<'_>> {
    std::iter::from_fn(move || {
        let head = bytes.get(begin..begin + HEAD)?;
        let end = begin + HEAD + number_of(&head[..3]);
        let payload = bytes.get(begin + HEAD..end)?;
        begin = end;
        Some(Frame {
            kind: head[3],
            flags: head[4],
            stream: number_of(&head[5..]),
            payload,
            end,
        })
    })
}
