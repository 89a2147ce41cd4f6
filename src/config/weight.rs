//! Weight of the squared error by timestep.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Weight of the squared error at each t.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossWeight {
    /// 1 at every t: the loss of the paper.
    #[default]
    Uniform,
    /// `min(SNR, gamma)` on the squared error of x_0 (Hang et al. 2023), `SNR = alpha_bar/(1 - alpha_bar)`, whatever the
    /// network predicts.
    MinSnr(f64),
}

impl fmt::Display for LossWeight {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            LossWeight::Uniform => write!(f, "uniform"),
            LossWeight::MinSnr(gamma) => write!(f, "min-snr:{gamma}"),
        }
    }
}

impl FromStr for LossWeight {
    type Err = String;

    /// `uniform`, `min-snr:5`, or `min-snr`, which is the same.
    fn from_str(text: &str) -> Result<Self, String> {
        let gamma = match text.split_once(':') {
            None if text == "uniform" => return Ok(LossWeight::Uniform),
            None if text == "min-snr" => Some(5.0),
            Some(("min-snr", gamma)) => gamma.parse().ok(),
            _ => None,
        };
        match gamma {
            Some(gamma) if gamma > 0.0 && f64::is_finite(gamma) => Ok(LossWeight::MinSnr(gamma)),
            _ => Err("use uniform, or min-snr:5 with a number above 0".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_written_as_they_are_read() {
        for (text, weight) in [("uniform", LossWeight::Uniform), ("min-snr:2.5", LossWeight::MinSnr(2.5))] {
            assert_eq!((text.parse(), weight.to_string().as_str()), (Ok(weight), text));
        }
        assert_eq!("min-snr".parse(), Ok(LossWeight::MinSnr(5.0)));
        for bad in ["", "snr", "min-snr:", "min-snr:0", "min-snr:-1", "min-snr:nan", "min-snr:inf", "uniform:1"] {
            assert!(bad.parse::<LossWeight>().unwrap_err().contains("min-snr:5"), "{bad}");
        }
    }
}
