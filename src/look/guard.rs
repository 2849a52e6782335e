//! Who may ask: this machine's own browser, on the page whose address was printed. A page elsewhere could otherwise
//! send requests here, also under a name that resolves to this machine (DNS rebinding).

use std::net::SocketAddr;

use rand::TryRngCore;

/// The names under which the server may be asked, and the secret part of its address.
pub struct Guard {
    hosts: Vec<String>,
    secret: String,
}

impl Guard {
    /// A guard of a server at an address, with a new secret from the operating system. It decides nothing that is
    /// measured, so it needs no seed.
    pub fn new(address: SocketAddr) -> Result<Self, rand::rand_core::OsError> {
        let mut bytes = [0_u8; 16];
        rand::rngs::OsRng.try_fill_bytes(&mut bytes)?;
        Ok(Self::with_secret(address, format!("{:032x}", u128::from_ne_bytes(bytes))))
    }

    fn with_secret(address: SocketAddr, secret: String) -> Self {
        let mut hosts = vec![address.to_string()];
        if address.ip().is_loopback() {
            hosts.push(format!("localhost:{}", address.port()));
        }
        if address.port() == 80 {
            // Browsers leave this port out.
            hosts.extend(hosts.clone().iter().filter_map(|host| Some(host.strip_suffix(":80")?.to_owned())));
        }
        Self { hosts, secret }
    }

    /// The address of the page.
    pub fn page(&self) -> String {
        format!("http://{}/{}/", self.hosts[0], self.secret)
    }

    /// The path behind the secret, or the reason why the request is refused.
    pub fn admitted<'a>(&self, host: Option<&str>, origin: Option<&str>, path: &'a str) -> Result<&'a str, String> {
        let is_ours = |name: &str| self.hosts.iter().any(|host| host.eq_ignore_ascii_case(name));
        if !host.is_some_and(is_ours) {
            return Err(format!("the request names another host, expected {}", self.hosts.join(" or ")));
        }
        if !origin.is_none_or(|origin| origin.strip_prefix("http://").is_some_and(is_ours)) {
            return Err("the request comes from another page".to_owned());
        }
        let rest = path.strip_prefix('/').and_then(|path| path.split_once('/'));
        match rest {
            // Of equal length, so that the time tells nothing of where the first difference is.
            Some((secret, rest)) if same(secret.as_bytes(), self.secret.as_bytes()) => Ok(rest),
            _ => Err("the address is not the one that undertone look printed".to_owned()),
        }
    }
}

fn same(left: &[u8], right: &[u8]) -> bool {
    left.len() == right.len() && left.iter().zip(right).fold(0, |all, (left, right)| all | (left ^ right)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_printed_address_is_answered() {
        let guard = Guard::with_secret("127.0.0.1:8080".parse().unwrap(), "abc".to_owned());
        assert_eq!(guard.page(), "http://127.0.0.1:8080/abc/");
        let ours = Some("127.0.0.1:8080");
        assert_eq!(guard.admitted(ours, None, "/abc/api/run"), Ok("api/run"));
        let on_80 = Guard::with_secret("127.0.0.1:80".parse().unwrap(), "abc".to_owned());
        assert_eq!(on_80.admitted(Some("127.0.0.1"), Some("http://localhost"), "/abc/"), Ok(""));
        assert_eq!(guard.admitted(Some("LOCALHOST:8080"), Some("http://localhost:8080"), "/abc/"), Ok(""));
        let refused = |host, origin, path| guard.admitted(host, origin, path).unwrap_err();
        for host in [None, Some("evil.example:8080"), Some("127.0.0.1"), Some("127.0.0.1:80"), Some("")] {
            assert!(refused(host, None, "/abc/").contains("another host"), "{host:?}");
        }
        for origin in ["http://evil.example", "https://127.0.0.1:8080", "null", "http://127.0.0.1:8081"] {
            assert!(refused(ours, Some(origin), "/abc/").contains("another page"), "{origin}");
        }
        for path in ["/", "/abd/", "/abc", "/ab/", "/abcd/", "abc/", "//abc/"] {
            assert!(refused(ours, None, path).contains("not the one"), "{path}");
        }
    }

    #[test]
    fn every_server_has_another_secret() {
        let pages: Vec<String> = (0..2).map(|_| Guard::new("127.0.0.1:1".parse().unwrap()).unwrap().page()).collect();
        assert!(pages[0] != pages[1] && pages[0].len() == "http://127.0.0.1:1/".len() + 33, "{pages:?}");
    }
}
