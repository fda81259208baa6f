//! Says to a gateway that this host is there, again and again: who stops saying so is forgotten.

use protocol::error::OpenAiError;
use protocol::node::{Join, Joined};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

/// How long a gateway may take to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// When to try again after a failure.
const AGAIN: Duration = Duration::from_secs(5);
/// Longest answer that is read.
const LONGEST: u64 = 64 << 10;

/// Which gateway to join, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gateway {
    /// Host and port of its second listener.
    pub authority: String,
    /// What it wants to be told.
    pub token: String,
    /// Where this host is reached; `None` is the address that the gateway sees.
    pub advertise: Option<String>,
}

/// A gateway that cannot be joined now.
#[derive(Debug, thiserror::Error)]
enum JoinError {
    #[error("it cannot be reached: {0}")]
    Unreachable(#[from] std::io::Error),
    #[error("it did not answer within {} s", ANSWER.as_secs())]
    Late,
    #[error("it refused: {0}")]
    Refused(String),
    #[error("what it answered is no answer to this")]
    Foreign,
}

impl Gateway {
    /// Reads `http://HOST:PORT`.
    #[must_use]
    pub fn authority_of(url: &str) -> Option<String> {
        let authority = url.strip_prefix("http://")?.trim_end_matches('/');
        let (host, port) = authority.rsplit_once(':')?;
        let sane = !host.is_empty() && !authority.contains(['/', ' ', '@']);
        (sane && port.parse::<u16>().is_ok()).then(|| authority.to_owned())
    }

    /// Joins, and stays joined. Never ends.
    pub async fn keep_joined(&self, name: &str, listen: SocketAddr) {
        let join = Join {
            name: name.to_owned(),
            endpoint: self.advertise.clone(),
            port: listen.port(),
        };
        let mut joined = false;
        loop {
            let answer = timeout(ANSWER, self.join(&join)).await;
            let wait = match answer.unwrap_or(Err(JoinError::Late)) {
                Ok(answer) => {
                    if !joined {
                        tracing::info!(gateway = self.authority, "joined as {name}");
                    }
                    joined = true;
                    Duration::from_secs(answer.again_in_seconds)
                }
                Err(error) => {
                    tracing::warn!(gateway = self.authority, %error, "cannot join");
                    joined = false;
                    AGAIN
                }
            };
            sleep(wait).await;
        }
    }

    async fn join(&self, join: &Join) -> Result<Joined, JoinError> {
        let body = serde_json::to_string(join).map_err(|_| JoinError::Foreign)?;
        let request = format!(
            "POST /nodes HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n{body}",
            self.authority,
            self.token,
            body.len()
        );
        let mut stream = TcpStream::connect(&self.authority).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(LONGEST).read_to_end(&mut answer).await?;
        read(&answer)
    }
}

fn read(answer: &[u8]) -> Result<Joined, JoinError> {
    let text = std::str::from_utf8(answer).map_err(|_| JoinError::Foreign)?;
    let (head, body) = text.split_once("\r\n\r\n").ok_or(JoinError::Foreign)?;
    let status = head.split(' ').nth(1).ok_or(JoinError::Foreign)?;
    if status == "200" {
        return serde_json::from_str(body).map_err(|_| JoinError::Foreign);
    }
    let said = serde_json::from_str::<OpenAiError>(body);
    let said = said.map_or_else(|_| status.to_owned(), |error| error.error.message);
    Err(JoinError::Refused(said))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_is_named_by_an_http_url_with_a_port() {
        let authority = |url| Gateway::authority_of(url);
        assert_eq!(
            authority("http://cortex:31314/").as_deref(),
            Some("cortex:31314")
        );
        for bad in [
            "cortex:31314",
            "http://cortex",
            "https://c:1",
            "http://c:1/x",
        ] {
            assert_eq!(authority(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_refusal_is_told_in_the_gateways_words() {
        let answer = b"HTTP/1.1 401 Unauthorized\r\n\r\n{\"error\":{\"message\":\"not the token\",\"type\":\"x\"}}";
        assert_eq!(
            read(answer).unwrap_err().to_string(),
            "it refused: not the token"
        );
        let answer = b"HTTP/1.1 200 OK\r\n\r\n{\"again_in_seconds\":10}";
        assert_eq!(read(answer).unwrap().again_in_seconds, 10);
        assert!(matches!(read(b"nonsense"), Err(JoinError::Foreign)));
    }
}
