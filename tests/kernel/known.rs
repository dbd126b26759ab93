//! Schedules of past failures, written out, so that a change of the strategies in `schedule` does not turn them into
//! others. Each fails if the mend that its name describes is undone.

use crate::{
    kernel::Link,
    rules,
    schedule::{Client, End, Form, Request, Schedule, Speaks},
    world,
};

/// Asserts that a client of this schedule loses nothing unreported.
fn play(form: Form, drain_timeout: u64, shutdown: u64, client: Client) {
    let schedule = Schedule {
        form,
        drain_delay: 0,
        drain_timeout,
        half_close: false,
        shutdown,
        clients: vec![client],
    };
    // Which of two tasks runs first is random.
    for _ in 0..20 {
        let played = world::play(&schedule);
        if let Err(error) = rules::check(&schedule, &played) {
            panic!("{error}");
        }
    }
}

/// A client that reads 500 bytes at a time, and stays.
fn client(link: Link, speaks: Speaks, requests: Vec<Request>) -> Client {
    Client {
        at: 0,
        link,
        speaks,
        requests,
        piece: 500,
        pause: 0,
        end: End::Stays,
    }
}

fn link(buffer: usize, receive: [usize; 2], delay: u64, seed: u64) -> Link {
    Link {
        send: [buffer, 4096],
        receive,
        segment: 512,
        delay,
        seed,
    }
}

/// A request without a body, whose handler responds at once with so many frames of this length.
fn get(after: u64, frames: usize, length: usize) -> Request {
    Request {
        after,
        upload: 0,
        upload_pause: 0,
        reads_upload: false,
        handler: 0,
        frames,
        length,
        gap: 0,
    }
}

/// Where a connection that expires is closed at once although the operating system does not tell what has arrived.
#[test]
fn a_response_on_its_way_at_the_cut_is_reported() {
    let slow = link(262_144, [1024, 1024], 10, 0);
    let speaks = Speaks::Http2 {
        window: 65_535,
        ping: None,
    };
    for shutdown in [117, 135] {
        let client = client(slow.clone(), speaks.clone(), vec![get(0, 2, 17_850)]);
        play(Form::Serve, 1, shutdown, client);
    }
}

/// Without lingering close, and with one that waits for 100 ms.
#[test]
fn a_response_arrives_at_a_client_whose_upload_pauses() {
    let link = link(16_384, [1024, 4096], 50, 1_410_934_714_677_192_568);
    let speaks = Speaks::Http1 {
        pipelines: true,
        chatter: None,
    };
    let response = Request {
        handler: 6,
        ..get(0, 1, 17_195)
    };
    let upload = Request {
        upload: 2000,
        upload_pause: 239,
        ..get(0, 0, 1)
    };
    play(
        Form::Serve,
        116,
        538,
        client(link, speaks, vec![response, upload]),
    );
}

/// Without lingering close, with one that takes an unknown send queue for an empty one, and with one that does not read.
#[test]
fn a_response_arrives_at_a_client_that_goes_on_sending() {
    let link = link(16_384, [1024, 1024], 24, 0);
    let speaks = Speaks::Http1 {
        pipelines: false,
        chatter: Some(1),
    };
    let with_gap = |handler, gap, response| Request {
        handler,
        gap,
        ..response
    };
    let requests = vec![
        with_gap(0, 16, get(0, 3, 1)),
        get(0, 3, 7497),
        Request {
            reads_upload: true,
            ..with_gap(1168, 53, get(0, 3, 6740))
        },
    ];
    let client = Client {
        pause: 4,
        ..client(link, speaks, requests)
    };
    play(Form::Serve, 755, 2311, client);
}

/// Where servers are told to close without a wait for silence, and without a last read.
#[test]
fn a_request_that_a_busy_server_has_not_read_when_draining_begins_is_answered() {
    for form in [Form::Serve, Form::Axum, Form::Hyper] {
        for late in [1, 10, 19] {
            // It arrives shortly before the stop, and the server runs `late` ms after that.
            let link = link(16_384, [32_768, 32_768], 0, 1 << 63 | late << 32);
            let speaks = Speaks::Http1 {
                pipelines: false,
                chatter: None,
            };
            let requests = vec![get(0, 1, 10), get(1000 - late / 2 - 1, 1, 10)];
            play(form, 2000, 1000, client(link, speaks, requests));
        }
    }
}
