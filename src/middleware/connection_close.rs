//! Asks an HTTP/1 client to close its connection, by `Connection: close`. The middleware, the
//! probes and the server call it.

use http::{
    HeaderValue, Response, StatusCode, Version,
    header::{CONNECTION, Entry},
};

/// Adds `Connection: close` ([RFC 9112 §9.6]) to the response to a request of this version, and
/// removes `keep-alive`. Other options of the field stay.
///
/// Leaves two kinds of responses unchanged. HTTP/2 has no such field ([RFC 9113 §8.2.2]). A `101
/// Switching Protocols` needs its own `Connection: upgrade`, and the connection is no longer HTTP/1
/// after it.
///
/// [RFC 9112 §9.6]: https://www.rfc-editor.org/rfc/rfc9112#section-9.6
/// [RFC 9113 §8.2.2]: https://www.rfc-editor.org/rfc/rfc9113#section-8.2.2
#[cold]
pub(crate) fn say_close<B>(response: &mut Response<B>, version: Version) {
    let http1 = matches!(version, Version::HTTP_10 | Version::HTTP_11);
    if !http1 || response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return;
    }
    if version == Version::HTTP_10 {
        // hyper adds `keep-alive` again to a response of a later version.
        *response.version_mut() = version;
    }
    let close = HeaderValue::from_static("close");
    match response.headers_mut().entry(CONNECTION) {
        Entry::Vacant(entry) => {
            entry.insert(close);
        }
        Entry::Occupied(mut entry) => {
            let kept = other_options(entry.iter());
            if kept.is_empty() {
                entry.insert(close);
            } else if let Ok(value) = HeaderValue::try_from(format!("close, {kept}")) {
                entry.insert(value);
            }
        }
    }
}

/// The options other than `close` and `keep-alive`, as one list.
fn other_options<'a>(values: impl Iterator<Item = &'a HeaderValue>) -> String {
    let mut kept = Vec::new();
    for value in values.filter_map(|value| value.to_str().ok()) {
        for option in value.split(',').map(str::trim) {
            let known = ["", "close", "keep-alive"];
            if !known.iter().any(|known| option.eq_ignore_ascii_case(known)) {
                kept.push(option);
            }
        }
    }
    kept.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closed(version: Version, status: StatusCode, before: &[&'static str]) -> Vec<String> {
        let mut response = Response::new(());
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert("x-other", HeaderValue::from_static("kept"));
        for value in before {
            headers.append(CONNECTION, HeaderValue::from_static(value));
        }
        say_close(&mut response, version);
        let headers = response.headers();
        assert_eq!(headers["x-other"], "kept");
        let values = headers.get_all(CONNECTION).iter();
        values.map(|v| v.to_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn close_is_added_once_and_other_options_stay() {
        let ok = StatusCode::OK;
        assert_eq!(closed(Version::HTTP_11, ok, &[]), ["close"]);
        assert_eq!(closed(Version::HTTP_10, ok, &[]), ["close"]);
        assert_eq!(closed(Version::HTTP_11, ok, &["keep-alive"]), ["close"]);
        assert_eq!(closed(Version::HTTP_11, ok, &["Close"]), ["close"]);
        assert_eq!(
            closed(Version::HTTP_11, ok, &["keep-alive, x-hop", "x-hip"]),
            ["close, x-hop, x-hip"]
        );
    }

    #[test]
    fn http2_and_upgrades_are_unchanged() {
        assert!(closed(Version::HTTP_2, StatusCode::OK, &[]).is_empty());
        assert!(closed(Version::HTTP_3, StatusCode::OK, &[]).is_empty());
        let upgrade = closed(
            Version::HTTP_11,
            StatusCode::SWITCHING_PROTOCOLS,
            &["upgrade"],
        );
        assert_eq!(upgrade, ["upgrade"]);
    }
}
