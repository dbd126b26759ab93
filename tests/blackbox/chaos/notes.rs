//! The notes of the server about each request, and the numbers of its report. The server process prints both
//! in this form, and the test reads them.

use tower_graceful::{Phase, Report};

/// How a request ended at the layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum End {
    /// Not at all.
    #[default]
    Open,
    /// The response body ended.
    Ended,
    /// The response body was dropped before it ended.
    Left,
    /// The response body failed.
    Failed,
    /// It was dropped without a response.
    Unanswered,
}

const ENDS: [End; 5] = [
    End::Open,
    End::Ended,
    End::Left,
    End::Failed,
    End::Unanswered,
];
const PHASES: [Phase; 5] = [
    Phase::Serving,
    Phase::LameDuck,
    Phase::Draining,
    Phase::Closing,
    Phase::Stopped,
];

/// What the server says of one request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Note {
    /// It reached a handler.
    pub(crate) admitted: bool,
    /// 0 if there was no response.
    pub(crate) status: u16,
    /// The phase before and after it was admitted or refused.
    pub(crate) called: [Phase; 2],
    /// The phase in which the response was made, or an earlier one.
    pub(crate) answered: Phase,
    pub(crate) end: End,
    /// The phase before and after its end.
    pub(crate) ended: [Phase; 2],
}

impl Default for Note {
    fn default() -> Self {
        Self {
            admitted: false,
            status: 0,
            called: [Phase::Serving, Phase::Stopped],
            answered: Phase::Serving,
            end: End::Open,
            ended: [Phase::Stopped; 2],
        }
    }
}

fn number<T: PartialEq>(all: &[T], one: &T) -> u64 {
    let place = all.iter().position(|other| other == one);
    place.expect("one of them") as u64
}

fn numbers(text: &str) -> Vec<u64> {
    text.split(' ').map(|it| it.parse().unwrap()).collect()
}

fn encode(numbers: &[u64]) -> String {
    let numbers: Vec<_> = numbers.iter().map(u64::to_string).collect();
    numbers.join(" ")
}

impl Note {
    pub(super) fn encode(&self) -> String {
        let phase = |it: &Phase| number(&PHASES, it);
        encode(&[
            self.admitted.into(),
            self.status.into(),
            phase(&self.called[0]),
            phase(&self.called[1]),
            phase(&self.answered),
            number(&ENDS, &self.end),
            phase(&self.ended[0]),
            phase(&self.ended[1]),
        ])
    }

    pub(super) fn decode(text: &str) -> Self {
        let numbers = numbers(text);
        let phase = |place: usize| PHASES[usize::try_from(numbers[place]).unwrap()];
        Self {
            admitted: numbers[0] == 1,
            status: numbers[1].try_into().unwrap(),
            called: [phase(2), phase(3)],
            answered: phase(4),
            end: ENDS[usize::try_from(numbers[5]).unwrap()],
            ended: [phase(6), phase(7)],
        }
    }
}

/// What the report counts.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) exit_code: usize,
    pub(crate) in_flight: usize,
    pub(crate) admitted: usize,
    pub(crate) finished: usize,
    pub(crate) refused: usize,
    pub(crate) cut: usize,
    pub(crate) dropped: usize,
    /// Of what remained: requests, holds, connections, servers, queued connections, half-closed requests.
    pub(crate) requests: usize,
    pub(crate) holds: usize,
    pub(crate) connections: usize,
    pub(crate) servers: usize,
    pub(crate) queued: usize,
    pub(crate) half_closed: usize,
}

impl Tally {
    pub(super) fn of(report: &Report) -> Self {
        let (requests, remaining) = (report.requests(), report.remaining());
        Self {
            exit_code: report.exit_code().into(),
            in_flight: requests.in_flight,
            admitted: requests.admitted,
            finished: requests.finished,
            refused: requests.refused,
            cut: requests.cut,
            dropped: requests.dropped,
            requests: remaining.requests,
            holds: remaining.holds,
            connections: remaining.connections,
            servers: remaining.servers,
            queued: remaining.queued,
            half_closed: remaining.half_closed,
        }
    }

    pub(super) fn encode(&self) -> String {
        let numbers = [
            self.exit_code,
            self.in_flight,
            self.admitted,
            self.finished,
            self.refused,
            self.cut,
            self.dropped,
            self.requests,
            self.holds,
            self.connections,
            self.servers,
            self.queued,
            self.half_closed,
        ];
        encode(&numbers.map(|it| it as u64))
    }

    pub(super) fn decode(text: &str) -> Self {
        let numbers = numbers(text);
        let at = |place: usize| usize::try_from(numbers[place]).unwrap();
        Self {
            exit_code: at(0),
            in_flight: at(1),
            admitted: at(2),
            finished: at(3),
            refused: at(4),
            cut: at(5),
            dropped: at(6),
            requests: at(7),
            holds: at(8),
            connections: at(9),
            servers: at(10),
            queued: at(11),
            half_closed: at(12),
        }
    }

    /// What was given up.
    pub(crate) fn given_up(&self) -> usize {
        self.requests
            + self.holds
            + self.connections
            + self.servers
            + self.queued
            + self.half_closed
    }
}
