//! What clients and handlers do, and when. All times are milliseconds.
//!
//! A change of a strategy (a range, a weight, the order of fields) or another version of proptest turns every seed in
//! `main.regressions` into another schedule, without notice. Before such a change, write out in `known` the schedules that
//! must be kept: undo the mend, and copy the schedule that proptest prints. After it, remove the seeds.

use proptest::{collection::vec, option, prelude::*};

use crate::kernel::Link;

#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    pub(crate) form: Form,
    pub(crate) drain_delay: u64,
    pub(crate) drain_timeout: u64,
    pub(crate) half_close: bool,
    /// When the stop is asked for, after the start.
    pub(crate) shutdown: u64,
    pub(crate) clients: Vec<Client>,
}

/// Which server owns the connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// `graceful.serve`
    Serve,
    /// `axum::serve` with `graceful.listener`
    Axum,
    /// hyper-util's connections, accepted from `graceful.listener`
    Hyper,
}

#[derive(Clone, Debug)]
pub(crate) struct Client {
    /// When it connects, after the start.
    pub(crate) at: u64,
    pub(crate) link: Link,
    pub(crate) speaks: Speaks,
    pub(crate) requests: Vec<Request>,
    /// It reads this many bytes at a time, and pauses after each read.
    pub(crate) piece: usize,
    pub(crate) pause: u64,
    pub(crate) end: End,
}

#[derive(Clone, Debug)]
pub(crate) enum Speaks {
    Http1 {
        /// Sends a request without waiting for the response to the one before.
        pipelines: bool,
        /// Sends an empty line at this interval after its last request.
        chatter: Option<u64>,
    },
    Http2 {
        /// The window of a stream and of the connection.
        window: u32,
        /// Sends a PING at this interval.
        ping: Option<u64>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Reads until the server closes.
    Stays,
    /// Closes when it has its last response.
    Closes,
    /// Closes its writing side after its last request, and reads until the server closes. In HTTP/2 as
    /// `Stays`.
    HalfCloses,
    /// Closes this long after it has connected, whatever it has read.
    Leaves(u64),
    /// Its host is gone this long after it has connected.
    Vanishes(u64),
}

#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// The pause before it.
    pub(crate) after: u64,
    /// The length of the request's body, and the pause after each piece of it.
    pub(crate) upload: usize,
    pub(crate) upload_pause: u64,
    /// The handler reads the request's body before it responds. It does not in HTTP/1 alone.
    pub(crate) reads_upload: bool,
    pub(crate) handler: u64,
    /// The frames of the response's body, their length, and the pause before each. One frame without a
    /// pause has a `Content-Length`.
    pub(crate) frames: usize,
    pub(crate) length: usize,
    pub(crate) gap: u64,
}

impl Request {
    pub(crate) fn body_length(&self) -> usize {
        self.frames * self.length
    }
}

fn links() -> impl Strategy<Value = Link> {
    let send = || prop_oneof![Just(4096_usize), Just(16 * 1024), Just(256 * 1024)];
    let receive = || prop_oneof![Just(1024_usize), Just(4096), Just(32 * 1024)];
    let segment = prop_oneof![Just(512_usize), Just(1460), Just(16 * 1024)];
    let delay = prop_oneof![Just(0_u64), 1_u64..10, 10_u64..100];
    (
        [send(), send()],
        [receive(), receive()],
        segment,
        delay,
        any::<u64>(),
    )
        .prop_map(|(send, receive, segment, delay, seed)| Link {
            send,
            receive,
            segment,
            delay,
            seed,
        })
}

fn speaks() -> impl Strategy<Value = Speaks> {
    let interval = || {
        option::of(prop_oneof![
            Just(1_u64),
            5_u64..50,
            50_u64..240,
            240_u64..2000
        ])
    };
    prop_oneof![
        (any::<bool>(), interval())
            .prop_map(|(pipelines, chatter)| Speaks::Http1 { pipelines, chatter }),
        (
            prop_oneof![Just(2048_u32), Just(16 * 1024), Just(65_535)],
            interval()
        )
            .prop_map(|(window, ping)| Speaks::Http2 { window, ping }),
    ]
}

fn requests() -> impl Strategy<Value = Request> {
    let short = || prop_oneof![2 => Just(0_u64), 1 => 1_u64..100, 1 => 100_u64..1500];
    let upload = prop_oneof![2 => Just(0_usize), 1 => 1_usize..2000, 1 => 2000_usize..40_000];
    let length = prop_oneof![1_usize..100, 1000_usize..20_000];
    let frames = prop_oneof![1 => Just(0_usize), 3 => Just(1), 2 => 2_usize..4];
    (
        short(),
        upload,
        prop_oneof![Just(0_u64), 1_u64..40, 40_u64..400],
        any::<bool>(),
        short(),
        frames,
        length,
        short(),
    )
        .prop_map(
            |(after, upload, upload_pause, reads_upload, handler, frames, length, gap)| Request {
                after,
                upload,
                upload_pause,
                reads_upload,
                handler,
                frames,
                length,
                gap,
            },
        )
}

fn clients() -> impl Strategy<Value = Client> {
    let end = prop_oneof![
        6 => Just(End::Stays),
        2 => Just(End::Closes),
        1 => Just(End::HalfCloses),
        1 => (0_u64..3000).prop_map(End::Leaves),
        1 => (0_u64..3000).prop_map(End::Vanishes),
    ];
    let piece = prop_oneof![Just(500_usize), Just(4096), Just(64 * 1024)];
    let pause = prop_oneof![2 => Just(0_u64), 2 => 1_u64..20, 1 => 20_u64..300];
    (
        prop_oneof![Just(0_u64), 0_u64..2000],
        links(),
        speaks(),
        vec(requests(), 1..4),
        piece,
        pause,
        end,
    )
        .prop_map(|(at, link, speaks, requests, piece, pause, end)| Client {
            at,
            link,
            speaks,
            requests,
            piece,
            pause,
            end,
        })
}

pub(crate) fn schedules() -> impl Strategy<Value = Schedule> {
    let form = prop_oneof![
        2 => Just(Form::Serve),
        1 => Just(Form::Axum),
        1 => Just(Form::Hyper),
    ];
    (
        form,
        prop_oneof![Just(0_u64), 0_u64..1500],
        prop_oneof![1_u64..500, 500_u64..8000],
        any::<bool>(),
        prop_oneof![Just(0_u64), 0_u64..3000],
        vec(clients(), 1..4),
    )
        .prop_map(
            |(form, drain_delay, drain_timeout, half_close, shutdown, clients)| Schedule {
                form,
                drain_delay,
                drain_timeout,
                half_close,
                shutdown,
                clients,
            },
        )
}
